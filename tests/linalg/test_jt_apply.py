import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.linalg import jt_apply, reference

ROUNDING = {torch.float64: 1e-14, torch.float32: 6e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 1), (9, 33), (70, 450), (3, 2100), (2, 3, 17, 40), (3, 0, 4), (3, 4, 0)])
def test_matches_float64(backend, shape, dtype):
    device, ops = backend
    x, w = randn(*shape).to(device, dtype), randn(*shape[:-1], seed=1).to(device)
    y = ops.jt_apply(x, w)
    exact = (x.double() * w[..., None]).sum(-2)
    size = (x.double() * w[..., None]).abs().sum(-2)
    assert y.dtype == dtype
    # The sum in float64, then one rounding, which for float16 may be one of a subnormal number.
    absolute = 1e-14 * size + (3e-8 if dtype == torch.float16 else 0)
    assert ((y.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + absolute).all()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 20), cols=st.integers(0, 50), batch=st.lists(st.integers(0, 3), max_size=2),
       dtype=st.sampled_from(list(ROUNDING)), seed=st.integers(0, 99))
def test_any_shape(rows, cols, batch, dtype, seed):
    x, w = randn(*batch, rows, cols, seed=seed).to(dtype), randn(*batch, rows, seed=seed + 1)
    torch.testing.assert_close(jt_apply(x, w), reference.jt_apply(x, w), rtol=2 * ROUNDING[dtype], atol=1e-6)


def test_cancellation_of_large_weights():
    x = torch.tensor([[1.0, 3.0], [1.0, 3.0000002]])
    w = torch.tensor([1e8, -1e8])
    assert torch.equal(jt_apply(x, w), (x.double().T @ w.double()).float())


def test_blocks_batch_strides_and_nan(backend):
    device, ops = backend
    x, w = randn(4, 12, 300).float().to(device), randn(4, 12).to(device)
    y = ops.jt_apply(x, w)
    assert all(torch.equal(y[i], ops.jt_apply(x[i], w[i])) for i in range(4))
    assert torch.equal(ops.jt_apply(x[..., ::2], w), y[..., ::2])
    if ops is not torch.ops.gradops:
        return
    parts = list(x.split([100, 200], -1))
    assert all(torch.equal(a, b) for a, b in zip(jt_apply(parts, w), y.split([100, 200], -1), strict=True))
    x[2, 3, 7] = torch.nan
    bad = jt_apply(x, w)
    assert bad[2, 7].isnan() and bad.isnan().sum() == 1


def test_derivatives_of_a_list():
    parts = tuple(randn(3, n, seed=n).requires_grad_() for n in (4, 2))
    w = randn(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, *j: tuple(jt_apply(j, w)), (w, *parts), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w, *j: tuple(jt_apply(j, w)), (w, *parts))
    half = parts[0].detach().bfloat16().requires_grad_()
    ours = torch.autograd.grad(jt_apply(half, w).sum(), (half, w))
    want = torch.autograd.grad(reference.jt_apply(half, w).sum(), (half, w))
    torch.testing.assert_close(ours, want)


def test_bad_input():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="w must be a torch.Tensor"):
        jt_apply(x, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"w must have the shape of J less the last dimension, \(2,\), got \(3,\)"):
        jt_apply(x, torch.ones(3))
