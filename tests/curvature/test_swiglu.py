import pytest
import torch

from gradops.curvature import reference, swiglu

from .second_order import check_second_order

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-15, torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def numbers(n, *shape, dtype=torch.float64, device="cpu"):
    random = torch.Generator().manual_seed(n)
    return [(3 * torch.randn(shape, dtype=torch.float64, generator=random)).to(device, dtype) for _ in range(n)]


def derivatives(gate, up, g, gate_dot, up_dot, g_dot):
    """y, y_dot, both gradients and their changes, by torch."""
    def gradients(*x):
        y, pull = torch.func.vjp(reference.swiglu, *x[:2])
        return y, *pull(x[2])

    values, changes = torch.func.jvp(gradients, (gate, up, g), (gate_dot, up_dot, g_dot))
    return values[0], changes[0], *values[1:], *changes[1:]


def raw(ops, gate, up, g, gate_dot, up_dot, g_dot):
    values = ops.swiglu(gate, up), *ops.swiglu_backward(gate, up, g, 3)
    change = ops.swiglu_jvp(gate, up, gate_dot, up_dot)
    changes = change, *ops.swiglu_backward_jvp(gate, up, g, gate_dot, up_dot, g_dot, 3)
    dual = ops.swiglu_dual(gate, up, gate_dot, up_dot), ops.swiglu_backward_dual(gate, up, g, gate_dot, up_dot, g_dot, 3)
    for one, other in zip((*values, *changes), (dual[0][0], *dual[1][:2], dual[0][1], *dual[1][2:]), strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING[one.dtype], atol=ROUNDING[one.dtype],
                                   equal_nan=True)
    return values[0], change, *values[1:], *changes[1:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (3, 17), (1030,)])
def test_matches_float64(backend, shape, dtype):
    device, ops = backend
    args = numbers(6, *shape, dtype=dtype, device=device)
    for y, want in zip(raw(ops, *args), derivatives(*(a.double() for a in args)), strict=True):
        assert y.dtype == dtype and y.shape == want.shape and y.is_contiguous()
        terms = 1 + want.abs().max() if want.numel() else 1  # that may cancel
        error = ROUNDING[dtype] * want.abs() + min(ROUNDING[dtype], ROUNDING[torch.float32]) * terms
        assert ((y.double() - want).abs() <= error).all()


def test_large_gates_and_nan(backend):
    device, ops = backend
    for dtype in (torch.float64, torch.float32):
        args = numbers(6, 8, dtype=dtype, device=device)
        args[0] = torch.tensor([1e4, -1e4, 90.0, -90.0, 30.0, -30.0, torch.nan, 1.0], dtype=dtype, device=device)
        for y, want in zip(raw(ops, *args), derivatives(*(a.double() for a in args)), strict=True):
            torch.testing.assert_close(y.double(), want, rtol=10 * ROUNDING[dtype], atol=1e-13, equal_nan=True)
            assert y.isnan().tolist() == [i == 6 for i in range(8)]


def test_strides_are_read_in_place(backend):
    device, ops = backend
    both, = numbers(1, 5, 3, 14, dtype=torch.float32, device=device)
    odd, = numbers(1, 7, 3, 5, dtype=torch.float32, device=device)
    row = torch.arange(7.0, device=device)
    for gate, up in (both.chunk(2, -1), (both[::2, :, :7], odd.T[::2]), (row.expand(5, 3, 7), both[..., 7:])):
        assert torch.equal(ops.swiglu(gate, up), ops.swiglu(gate.clone(), up.clone()))
        for ours, want in zip(ops.swiglu_backward(gate, up, up, 3),
                              ops.swiglu_backward(gate.clone(), up.clone(), up.clone(), 3), strict=True):
            assert torch.equal(ours, want)


def test_without_up_and_only_what_is_wanted(backend):
    device, ops = backend
    gate, up, g, gate_dot, up_dot, g_dot = numbers(6, 700, dtype=torch.float32, device=device)
    one, zero = torch.ones_like(gate), torch.zeros_like(gate)
    assert torch.equal(ops.swiglu(gate, None), ops.swiglu(gate, one))
    left, right = ops.swiglu_backward_jvp(gate, None, g, gate_dot, None, None, 1)
    assert right.numel() == 0
    assert torch.equal(left, ops.swiglu_backward_jvp(gate, one, g, gate_dot, zero, zero, 1)[0])
    both = ops.swiglu_backward_dual(gate, up, g, gate_dot, up_dot, g_dot, 3)
    right = ops.swiglu_backward_dual(gate, up, g, gate_dot, up_dot, g_dot, 2)
    assert right[0].numel() == right[2].numel() == 0
    assert torch.equal(right[1], both[1]) and torch.equal(right[3], both[3])


def test_both_orders():
    gate, up = numbers(2, 2, 3)
    check_second_order(swiglu, reference.swiglu, [gate, up])
    check_second_order(swiglu, reference.swiglu, [gate])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_second_order_accuracy(dtype, bound):
    x = numbers(6, 50, 40, dtype=dtype)

    def products(f, gate, up, g, *v):
        return torch.func.jvp(lambda a, b: torch.func.vjp(f, a, b)[1](g), (gate, up), v[:2])[1]

    for ours, want in zip(products(swiglu, *x), products(reference.swiglu, *(t.double() for t in x)), strict=True):
        assert ours.dtype == dtype and (ours.double() - want).norm() <= bound * want.norm()


def test_wrong_input():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="gate must be float64, float32, bfloat16 or float16"):
        swiglu(x.int())
    with pytest.raises(TypeError, match=r"up must be a torch.Tensor, got float"):
        swiglu(x, 1.0)
    with pytest.raises(TypeError, match=r"up must have the dtype of gate, torch.float32, got torch.float64"):
        swiglu(x, x.double())
    with pytest.raises(ValueError, match=r"up must have the shape of gate, \(2, 3\), got \(3,\)"):
        swiglu(x, x[0])
