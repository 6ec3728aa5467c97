import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.ot import reference, sparse_simplex_projection

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def vectors(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(values, indices, size):
    return torch.zeros(*values.shape[:-1], size, dtype=values.dtype).scatter(-1, indices, values)


def check(X, k, z, out, tolerance):
    """Against float64; which of equal entries is kept is checked by the values only."""
    values, indices, tau = (t.cpu() for t in out)
    size, X = X.shape[-1], X.cpu()
    width = min(k, size)
    assert values.shape == indices.shape == (*X.shape[:-1], width) and values.dtype == tau.dtype == X.dtype
    assert (indices.diff(dim=-1) > 0).all() and (values >= 0).all()
    want, where, threshold = reference.sparse_simplex_projection(X.double(), k, z.cpu())
    if X.numel() == 0:
        return
    scale = 1 + X.double().abs().amax() + z.cpu().amax()
    torch.testing.assert_close(dense(values.double(), indices, size).sort(-1)[0],
                               dense(want, where, size).sort(-1)[0], atol=tolerance * scale, rtol=tolerance)
    torch.testing.assert_close(tau.double(), threshold, atol=tolerance * scale, rtol=tolerance)
    positive = values > 0  # what is kept is not smaller than what is not
    entries = X.double().gather(-1, indices)
    left = X.double().scatter(-1, indices, torch.where(positive, -torch.inf, entries)).amax(-1)
    assert (entries.where(positive, torch.inf).amin(-1) >= left).logical_or(positive.sum(-1) < width).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 16, 300])
@pytest.mark.parametrize("shape", [(1,), (2, 7), (3, 64), (2, 2, 300), (0, 5)])
def test_matches_float64(backend, shape, k, dtype):
    device, ops = backend
    X = vectors(*shape).to(dtype).to(device)
    z = (0.3 + vectors(*shape[:-1], seed=1).abs()).to(device)
    check(X, k, z, ops.sparse_simplex_projection(X, z, min(k, shape[-1])), ROUNDING[dtype])


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 700), k=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 99),
       levels=st.sampled_from([0, 3]))
def test_any_size_with_ties(size, k, scale, seed, levels):
    X = vectors(2, size, seed=seed) * scale
    X = (X * levels / scale).round() if levels else X
    z = torch.tensor([0.5, 20.0], dtype=torch.float64)
    values, indices, tau = sparse_simplex_projection(X, k, z)
    check(X, k, z, (values, indices, tau), 1e-13)
    torch.testing.assert_close(values.sum(-1), z, rtol=1e-14, atol=0)


def test_ties_go_to_the_lowest_index(backend):
    device, ops = backend
    X = torch.tensor([[0.0, 1, 1, 1, 0, 1]] * 2 + [[1.0] * 6], device=device, dtype=torch.float64)
    values, indices, _ = ops.sparse_simplex_projection(X, torch.ones(3, device=device, dtype=torch.float64), 2)
    assert indices.tolist() == [[1, 2], [1, 2], [0, 1]] and (values == 0.5).all()


def test_unused_slots_hold_the_first_remaining_indices(backend):
    device, ops = backend
    X = torch.tensor([0.0, 0.0, 9.0, 0.0, 5.0], device=device)
    values, indices, tau = ops.sparse_simplex_projection(X, torch.ones((), device=device, dtype=torch.float64), 3)
    assert indices.tolist() == [0, 1, 2] and values.tolist() == [0, 0, 1] and tau == 8


def test_masked_entries_and_values_that_are_no_numbers(backend):
    device, ops = backend
    X = vectors(5, 400).to(device)
    X[0, 5:] = -torch.inf
    X[1, 3] = torch.nan
    X[2, 4] = torch.inf
    X[3] = -torch.inf
    z = torch.ones(5, dtype=torch.float64, device=device)
    values, indices, tau = ops.sparse_simplex_projection(X, z, 8)
    assert (values[0][indices[0] >= 5] == 0).all() and abs(values[0].sum() - 1) < 1e-14
    assert values[1:4].isnan().all() and tau[1:4].isnan().all() and values[4].isfinite().all()


def test_sums_stay_exact_far_from_zero():
    X = vectors(4, 500) * 1e-3 + 1e6
    values, _, _ = sparse_simplex_projection(X, 20, 0.01)
    torch.testing.assert_close(values.sum(-1), torch.full((4,), 0.01, dtype=torch.float64), rtol=1e-14, atol=0)


def test_dim_strides_and_a_broadcast_z():
    X = vectors(4, 30, 5).float()
    z = [1.0, 2.0, 0.5, 0.25]
    values, indices, tau = sparse_simplex_projection(X, 4, torch.tensor(z)[:, None], dim=1)
    for i in range(4):
        for j in range(5):
            alone = sparse_simplex_projection(X[i, :, j], 4, z[i])
            assert torch.equal(values[i, :, j], alone[0]) and torch.equal(indices[i, :, j], alone[1])
            assert torch.equal(tau[i, j], alone[2])
    whole, order, _ = sparse_simplex_projection(X)
    assert torch.equal(order, torch.arange(5).expand(4, 30, 5)) and whole.shape == X.shape


def test_derivatives():
    X, z = vectors(3, 12).requires_grad_(), (0.4 + vectors(3, seed=2).abs()).requires_grad_()

    def f(X, z):
        values, _, tau = sparse_simplex_projection(X, 4, z)
        return values, tau

    assert torch.autograd.gradcheck(f, (X, z), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda X, z: [t.square() for t in f(X, z)], (X, z))
    plain = sparse_simplex_projection(X.detach(), 4, z.detach())
    for ours, want in zip(sparse_simplex_projection(X, 4, z), plain, strict=True):
        torch.testing.assert_close(ours, want)


def test_bad_input():
    X = torch.ones(2, 3)
    with pytest.raises(TypeError, match="X must be a torch.Tensor, got ndarray"):
        sparse_simplex_projection(np.ones(3))
    with pytest.raises(TypeError, match="z must be a number, got str"):
        sparse_simplex_projection(X, 2, z="x")
    with pytest.raises(ValueError, match="max_nz must be an integer >= 1, got 0"):
        sparse_simplex_projection(X, 0)
    with pytest.raises(ValueError, match=r"dim must be in \[-2, 2\), got 2"):
        sparse_simplex_projection(X, dim=2)
    with pytest.raises(ValueError, match=r"z must be broadcastable to X without dim, \(2,\), got shape \(3,\)"):
        sparse_simplex_projection(X, z=torch.ones(3))
    with pytest.raises(ValueError, match="z must be finite and positive, got -1"):
        sparse_simplex_projection(X, z=-1.0)
    with pytest.raises(ValueError, match="z must be finite and positive, got 0"):
        sparse_simplex_projection(X, z=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="at least one entry"):
        sparse_simplex_projection(torch.ones(2, 0))
