import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.linalg import reference, row_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (60, 1000), (3, 2049), (2, 1, 600, 17), (0, 5), (5, 0), (0, 3, 4)])
def test_matches_float64(backend, shape, dtype, center):
    device, ops = backend
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    before = x.clone()
    y = ops.row_norm(x, 1e-8, center)
    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, before)
    want = reference.row_norm(x.double(), eps=1e-8, center=center)
    absolute = 1e-16 if dtype == torch.float64 else 1e-7
    assert ((y.double() - want).abs() <= ROUNDING[dtype] * want.abs() + absolute).all()


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=2, max_size=4), center=st.booleans(),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_shape(shape, center, dtype, seed):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = row_norm(x, center=center)
    want = reference.row_norm(x.double(), center=center).to(dtype)
    torch.testing.assert_close(y, want, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 2.0**100), (torch.float32, 2.0**-100),
                                          (torch.bfloat16, 2.0**100), (torch.float64, 2.0**600),
                                          (torch.float64, 2.0**-600)])
@pytest.mark.parametrize("center", [False, True])
def test_scale(backend, dtype, scale, center):
    device, ops = backend
    x = torch.randn(6, 40, device=device).to(dtype)
    torch.testing.assert_close(ops.row_norm(x * scale, 0.0, center), ops.row_norm(x, 0.0, center))


def test_zero_rows_nan_and_inf_stay_where_they_are(backend):
    device, ops = backend
    x = torch.randn(3, 4, 50, device=device)
    want = ops.row_norm(x, 1e-8, False)
    x[0, 1], x[1, 2, 3], x[2, 0, 0] = 0, torch.nan, torch.inf
    y = ops.row_norm(x, 1e-8, False)
    assert (y[0, 1] == 0).all() and y[1, 2].isnan().all() and y[2, 0, 0].isnan()
    keep = torch.ones(3, 4, dtype=torch.bool, device=device)
    keep[0, 1] = keep[1, 2] = keep[2, 0] = False
    assert torch.equal(y[keep], want[keep])
    centered = ops.row_norm(x, 1e-8, True)
    assert centered[1].isnan().all() and not centered[0].isnan().any()


def test_batch_item_equals_single(backend):
    device, ops = backend
    x = torch.randn(3, 300, 70, device=device)
    for center in (False, True):
        y = ops.row_norm(x, 1e-8, center)
        assert all(torch.equal(y[i], ops.row_norm(x[i], 1e-8, center)) for i in range(3))


def test_strided_input(backend):
    device, ops = backend
    x = torch.randn(40, 64, device=device)
    for view in (x[::2], x[:, ::2], x.t(), x[:1].expand(5, 64)):
        assert torch.equal(ops.row_norm(view, 1e-8, False), ops.row_norm(view.clone(), 1e-8, False))


def test_zero_row_has_a_finite_gradient():
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(row_norm(x, eps=0.5).sum(), x)
    assert torch.equal(grad, torch.full_like(grad, 2))


def test_bad_input():
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got ndarray"):
        row_norm(np.ones((2, 2)))
    for bad in (torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.complex64), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match="x must be"):
            row_norm(bad)
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        row_norm(torch.ones(3))
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must not be negative"):
            row_norm(torch.ones(2, 2), eps=eps)
