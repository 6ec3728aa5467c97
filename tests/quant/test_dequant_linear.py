import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.quant import dequant_linear, pack_gptq, reference, rtn_quantize

BITS = [2, 3, 4, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the output; sums of float32 err by much less than a bfloat16, and by some ulps of the largest partial sum.
ROUNDING = {torch.float32: 0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def problem(rows, n, out, bits, group, *, seed=0, scale_dtype=torch.float16, order="in", dtype=torch.float32):
    """x, and all tensors of a weight whose bits are random; order: "in", of inputs by group, or "any"."""
    g = torch.Generator().manual_seed(seed)

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, generator=g).int()

    groups = -(-n // group)
    g_idx = torch.arange(n, dtype=torch.int32) // group
    if order == "any":
        g_idx = g_idx[torch.randperm(n, generator=g)]
    return (torch.randn(rows, n, generator=g).to(dtype), words((n * bits + 31) // 32, out),
            (torch.rand(groups, out, generator=g) + 0.5).to(scale_dtype), words(groups, (out * bits + 31) // 32), g_idx)


def exact(x, *weight, bits, less_one=True):
    return reference.dequant_linear(x.double(), *weight, bits=bits,
                                    checkpoint_format="gptq" if less_one else "gptq_v2")


def raw(ops, x, weight, bits, bias=None, group=0, less_one=True):
    return ops.dequant_linear(x, *weight, bias, bits, group, less_one)


def on(device, tensors):
    return [t if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows, n, out, group, order", [
    (3, 130, 45, 32, "in"), (9, 64, 33, 12, "in"), (2, 33, 7, 200, "in"), (1, 45, 128, 32, "any")])
def test_matches_float64(backend, rows, n, out, group, order, bits):
    device, ops = backend
    kinds = list(zip(DTYPES, reversed(DTYPES), (True, False, True)))
    if ops is not torch.ops.gradops:  # the emulator is slow
        kinds = kinds[bits % 3 :][:1]
    for dtype, scale_dtype, less_one in kinds:
        x, *weight = problem(rows, n, out, bits, group, order=order, dtype=dtype, scale_dtype=scale_dtype)
        bias = torch.randn(out).to(scale_dtype)
        y = raw(ops, x.to(device), on(device, weight), bits, bias.to(device), less_one=less_one).cpu()
        dense = exact(torch.eye(n, dtype=torch.float64), *weight, bits=bits, less_one=less_one)
        want, terms = x.double() @ dense + bias.double(), x.double().abs() @ dense.abs() + bias.double().abs()
        assert y.dtype == dtype and y.shape == want.shape
        # 2^-24 per addition in float32 is a bound nothing comes near: errors average
        assert ((y.double() - want).abs() <= 1e-6 * terms + ROUNDING[dtype] * want.abs()).all()


@pytest.mark.parametrize("bits", BITS)
def test_float32_is_accurate(bits):
    x, *weight = problem(5, 1024, 60, bits, 128, seed=1)
    y, want = raw(torch.ops.gradops, x, weight, bits), exact(x, *weight, bits=bits)
    assert (y.double() - want).norm() / want.norm() < 5e-7  # float32 has 6e-8; sums are of 128 terms, then of 8


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 20), n=st.integers(0, 150), out=st.integers(0, 150), bits=st.sampled_from(BITS),
       group=st.integers(1, 70), order=st.sampled_from(["in", "any", None]), seed=st.integers(0, 9))
def test_any_shape(rows, n, out, bits, group, order, seed):
    x, *weight = problem(rows, n, out, bits, group, seed=seed, order=order)
    if order is None:
        weight[3] = None
    y = dequant_linear(x, *weight, bits=bits, group_size=group)
    want = reference.dequant_linear(x.double(), *weight, bits=bits, group_size=group)
    torch.testing.assert_close(y.double(), want, atol=2e-6 * 2**bits * max(n, 1) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("order, dtype", [("in", torch.float32), ("any", torch.float32), ("in", torch.bfloat16)])
def test_a_row_does_not_depend_on_the_others(order, dtype):
    x, *weight = problem(300, 200, 150, 4, 32, order=order, dtype=dtype)
    y = raw(torch.ops.gradops, x, weight, 4)
    for rows in (1, 2, 3, 5, 8, 129):
        assert torch.equal(raw(torch.ops.gradops, x[-rows:], weight, 4), y[-rows:])
    x[7] = torch.nan
    z = raw(torch.ops.gradops, x, weight, 4)
    assert z[7].isnan().all() and torch.equal(z[8:], y[8:]) and torch.equal(z[:7], y[:7])


@pytest.mark.parametrize("bits", BITS)
def test_dense_weight(backend, bits):
    device, ops = backend
    order = "any" if bits % 4 else "in"
    _, *weight = problem(1, 70, 140, bits, 24, order=order)
    want = exact(torch.eye(70, dtype=torch.float64), *weight, bits=bits)
    for dtype in (torch.float32, torch.float16, torch.bfloat16 if bits < 4 else torch.float64):
        w = ops.dequant_weight(torch.empty(0, dtype=dtype, device=device), *on(device, weight), 70, bits, 0, True)
        assert torch.equal(w.cpu(), want.to(dtype))  # codes, zero points and these scales multiply exactly in float32


def test_strided_and_batched_input(backend):
    device, ops = backend
    x, *weight = on(device, problem(12, 64, 40, 4, 32))
    want = raw(ops, x, weight, 4)
    assert torch.equal(raw(ops, x.T.contiguous().T, weight, 4), want)
    assert torch.equal(raw(ops, x.view(3, 4, 64), weight, 4), want.view(3, 4, 40))
    assert torch.equal(raw(ops, x[0], weight, 4), want[0])
    assert torch.equal(raw(ops, x, [t.T.contiguous().T for t in weight[:3]] + weight[3:], 4), want)


def test_the_words_of_a_checkpoint():
    q = rtn_quantize(torch.randn(3, 48, 96)[1], bits=3, group_size=32, scale_dtype=torch.float16, sym=False)
    x = torch.randn(4, 96, dtype=torch.float64)
    for checkpoint_format in ("gptq", "gptq_v2"):
        try:
            tensors = pack_gptq(q, bits=3, checkpoint_format=checkpoint_format)
        except ValueError:
            assert checkpoint_format == "gptq" and (q.zeros == 0).any()
            continue
        y = dequant_linear(x, **tensors, bits=3, checkpoint_format=checkpoint_format)
        torch.testing.assert_close(y, x @ q.weight.double().T)


def test_derivatives_of_large_layers():
    x, *weight = problem(6, 1100, 30, 3, 64, order="any", dtype=torch.bfloat16)
    x.requires_grad_()
    y = dequant_linear(x, *weight, bits=3)
    seed = torch.randn_like(y)
    grad, = torch.autograd.grad(y, x, seed)
    want = seed.double() @ exact(torch.eye(1100, dtype=torch.float64), *weight, bits=3).T
    assert grad.dtype == x.dtype
    assert ((grad.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-4).all()


def test_bad_input():
    x, qweight, scales, qzeros, g_idx = problem(2, 64, 32, 4, 32)

    def call(x=x, qweight=qweight, scales=scales, qzeros=qzeros, g_idx=g_idx, bias=None, bits=4, **more):
        return dequant_linear(x, qweight, scales, qzeros, g_idx, bias, bits=bits, **more)

    call()
    for error, message, change in (
        (TypeError, "x must be float64, float32", {"x": x.int()}),
        (ValueError, "x must have at least 1 dim", {"x": x[0, 0]}),
        (TypeError, "qweight must be int32", {"qweight": qweight.long()}),
        (TypeError, "qzeros must be int32", {"qzeros": qzeros.float()}),
        (TypeError, "g_idx must be int32", {"g_idx": g_idx.long()}),
        (TypeError, "scales must be float64", {"scales": qzeros}),
        (TypeError, "bias must be a torch.Tensor", {"bias": 3}),
        (ValueError, r"qweight must have shape \(8, 32\)", {"qweight": qweight[:7]}),
        (ValueError, r"qzeros must have shape \(2, 4\)", {"qzeros": qzeros[:1]}),
        (ValueError, r"g_idx must have shape \(64,\)", {"g_idx": g_idx[:7]}),
        (ValueError, r"bias must have shape \(32,\)", {"bias": torch.ones(31)}),
        (ValueError, "scales must have shape", {"scales": scales[0]}),
        (ValueError, "scales must have a row for each group of 16", {"g_idx": None, "group_size": 16}),
        (ValueError, "group_size must be positive", {"group_size": 0}),
        (ValueError, "bits must be one of 2, 3, 4, 8, got 5", {"bits": 5}),
        (ValueError, "checkpoint_format must be one of", {"checkpoint_format": "awq"}),
        (ValueError, "g_idx must be 0 to 1", {"g_idx": g_idx + 1}),
        (ValueError, "g_idx must be 0 to 1", {"g_idx": g_idx - 1}),
        (RuntimeError, "scales asks for a derivative", {"scales": scales.float().requires_grad_()}),
        (RuntimeError, "bias asks for a derivative", {"bias": torch.ones(32, requires_grad=True)}),
    ):
        with pytest.raises(error, match=message):
            call(**change)


def test_groups_that_are_not_there_are_not_read(cuda_backend):
    device, ops = cuda_backend
    x, *weight = on(device, problem(2, 64, 32, 4, 32))
    for change in (-100, 100):
        assert raw(ops, x, [*weight[:3], weight[3] + change], 4).isfinite().all()
