"""`solve` and its twin: the same arguments, the same results."""
import inspect

import pytest
import torch

from gradops import ot


def problem(n, m, batch=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(*batch, k, generator=g, dtype=torch.float64) for k in (n, m))
    a[..., 0] = b[..., -1] = 0
    return torch.rand(*batch, n, m, generator=g), a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def same(*args, **options):
    ours, want = ot.solve(*args, **options), ot.reference.solve(*args, **options)
    assert ours.status == want.status
    torch.testing.assert_close(ours.plan.to_dense(), want.plan.to_dense(), rtol=0, atol=1e-6)
    for name in ("value", "dual_value"):  # the gap that "converged" allows
        torch.testing.assert_close(getattr(ours, name), getattr(want, name), rtol=2e-9, atol=2e-9)
    for x, y in zip(ours.potentials, want.potentials, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_the_same_signature():
    ours, want = (inspect.signature(f).parameters for f in (ot.solve, ot.reference.solve))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in want.values()]


@pytest.mark.parametrize("reg", [0.5, 5.0])  # under less, supports fall apart, and potentials are not unique
def test_batched_weighted_and_masked(reg):
    M, a, b = problem(8, 9, (2,))
    M[:, 1, 2] = torch.inf
    same(M, a, b, reg=reg)
    same(M[0], a, reg=reg)


def test_points_and_lengths():
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 7, 3, generator=g), torch.randn(8, 3, generator=g)
    same(None, x=x, y=y, reg=20.0, n_len=torch.tensor([7, 4]), m_len=torch.tensor([5, 8]))


@pytest.mark.parametrize("max_nz", [1, 2])
def test_max_nz_is_no_worse(max_nz):
    M, _, _ = problem(10, 12, (2,))
    ours = ot.solve(M, reg=1.0, max_nz=max_nz)
    want = ot.reference.solve(M, reg=1.0, max_nz=max_nz, max_iter=200)
    assert (ours.dual_value >= want.dual_value - 1e-5 * want.dual_value.abs()).all()
    assert ((want.plan.values > 0).sum(-1) <= max_nz).all()


def test_infeasible():
    M = torch.rand(3, 4)
    M[1] = torch.inf
    assert ot.solve(M).status == ot.reference.solve(M).status == "infeasible"
