import pytest
import torch

from gradops.ot.plan_vjp import plan_vjp
from gradops.ot.reference.plan_vjp import plan_vjp as reference


def problem(n, m, width, batch=(), seed=0):
    """A random support with empty columns, unused rows, unused places and a few components."""
    g = torch.Generator().manual_seed(seed)
    shape = (*batch, m, width)
    index = torch.rand(*batch, m, n, generator=g).argsort(-1)[..., :width]
    value = torch.rand(shape, generator=g, dtype=torch.float64)
    value[torch.rand(shape, generator=g) < 0.4] = 0
    index[value == 0] = -1
    return index, value, *(torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, (*batch, n), (*batch, m)))


@pytest.mark.parametrize("n, m, width", [(1, 1, 1), (6, 5, 2), (7, 40, 3), (20, 7, 9), (30, 30, 2), (12, 12, 12)])
def test_matches_dense_algebra(n, m, width):
    index, value, g, p, q = problem(n, m, width, (3,))
    zero = (torch.zeros_like(p), torch.zeros_like(q))
    ours, want = plan_vjp(index, value, g, *zero), reference(index, value, g, *zero)
    for x, y in zip(ours, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    # p and q that a plan on this support can follow: its own marginals
    rows = torch.zeros_like(p).scatter_add_(-1, index.clamp_min(0).flatten(-2), value.flatten(-2))
    for x, y in zip(plan_vjp(index, value, g, rows, value.sum(-1)), reference(index, value, g, rows, value.sum(-1)),
                    strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_a_long_path():  # the Laplacian with the worst condition: its eigenvalues come down to 1 / n^2
    n = 400
    index = torch.stack([torch.arange(n - 1), torch.arange(1, n)], 1)
    g = torch.randn(n - 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r, u, v = plan_vjp(index, torch.ones_like(g), g, torch.zeros(n, dtype=torch.float64), torch.zeros(n - 1).double())
    assert r.abs().max() < 1e-11  # a forest carries no plan with zero marginals but zero
    torch.testing.assert_close(u[index] + v[:, None], g, rtol=0, atol=1e-11)


def test_derivatives_of_any_order():
    index, value, g, p, q = problem(6, 5, 3, (2,))
    inputs = [x.requires_grad_() for x in (g, p, q)]
    f = lambda *x: plan_vjp(index, value, *x)
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_nan_and_bad_indices_stay_where_they_are():
    index, value, g, p, q = problem(6, 5, 3, (3,))
    want = plan_vjp(index, value, g, p, q)
    value[1, 2, 0] = g[2, 0] = torch.nan
    for x, y in zip(plan_vjp(index, value, g, p, q), want, strict=True):
        assert torch.equal(x[0], y[0]) and x[1].isnan().all() and x[2].isnan().any()
    value[1, 2, 0], index[1, 2, 0] = 1, 6
    with pytest.raises(ValueError, match=r"indices of the plan must be in \[0, 6\).*got 6"):
        plan_vjp(index, value, g, p, q)


def test_empty_and_strided():
    for n, m, width, batch in ((3, 0, 2, ()), (3, 4, 0, (2,)), (3, 4, 2, (0,))):
        index, value, g, p, q = problem(n, m, width, batch)
        r, u, v = plan_vjp(index, value, g, p, q)
        assert r.shape == g.shape and not u.any() and not v.any()
    inputs = problem(6, 5, 3, (2,))
    twice = [x.repeat_interleave(2, -1)[..., ::2] for x in inputs]
    assert all(torch.equal(x, y) for x, y in zip(plan_vjp(*inputs), plan_vjp(*twice), strict=True))
