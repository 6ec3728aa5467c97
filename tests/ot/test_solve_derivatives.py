import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gradops import ot

TIGHT = {"tol": 1e-11}  # finite differences see every digit


def problem(n=4, m=5, batch=(2,), seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(*batch, k, generator=g, dtype=torch.float64) / 2 for k in (n, m)]
    return torch.rand(*batch, n, m, generator=g, dtype=torch.float64), *weights


def solved(M, a, b, reg=0.5, **options):
    """Weights by a softmax: derivatives mean something only along weights whose sums agree."""
    return ot.solve(M, a.softmax(-1), b.softmax(-1), reg=reg, **TIGHT, **options)


def marked(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("reg", [0.05, 2.0])  # some columns with one entry; nearly everything in the support
def test_value_and_plan(reg):
    inputs = marked(*problem(batch=()))
    value = lambda *t: solved(*t, reg=reg).value
    plan = lambda *t: solved(*t, reg=reg).plan.to_dense()
    for f in (value, lambda *t: solved(*t, reg=reg).dual_value, plan):
        assert gradcheck(f, inputs, check_forward_ad=True, atol=1e-6)
    assert gradgradcheck(lambda M: value(M, *(t.detach() for t in inputs[1:])), inputs[:1], atol=1e-5)


def test_points():
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, k, 2, generator=g, dtype=torch.float64).requires_grad_() for k in (3, 4))
    result = lambda x, y: ot.solve(None, x=x, y=y, reg=1.0, **TIGHT)
    assert gradcheck(lambda *t: result(*t).value, (x, y), check_forward_ad=True)
    assert gradcheck(lambda *t: result(*t).plan.to_dense(), (x, y), check_forward_ad=True, atol=1e-6)
    assert gradgradcheck(lambda *t: result(*t).value, (x, y), atol=1e-5)


def test_gradients_are_the_plan_and_the_potentials():
    M, a, b = problem(batch=())
    M = M.float().requires_grad_()
    a, b = a.softmax(-1).requires_grad_(), b.softmax(-1).requires_grad_()
    result = ot.solve(M, a, b, reg=0.3)
    to_M, to_a, to_b = torch.autograd.grad(result.value, (M, a, b))
    assert to_M.dtype == torch.float32 and torch.equal(to_M, result.plan.to_dense().float())
    assert torch.equal(to_a, result.potentials.alpha) and torch.equal(to_b, result.potentials.beta)


def test_max_nz_is_differentiated_on_its_support():
    M = problem(6, 4, ())[0].requires_grad_()
    result = ot.solve(M, reg=0.2, max_nz=2, max_iter=50)
    assert torch.equal(torch.autograd.grad(result.value, M, retain_graph=True)[0], result.plan.to_dense())
    to_M, = torch.autograd.grad(result.plan.values.square().sum(), M)
    dense = result.plan.to_dense()
    assert not to_M[dense == 0].any() and to_M.sum(0).abs().max() < 1e-12 and to_M.sum(1).abs().max() < 1e-12


def test_transforms():
    M, a, b = problem()
    value = lambda M: solved(M, a[0], b[0]).value
    each = torch.func.vmap(torch.func.grad(value))(M)
    for x, g in zip(M, each, strict=True):
        x = x.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(value(x), x)[0], g)
    points = lambda x: ot.solve(None, x=x, y=x.flip(0), reg=1.0).value
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(points))(M),
                               torch.stack([torch.func.grad(points)(x) for x in M]))
    torch.testing.assert_close(torch.func.jacfwd(value)(M[0]), each[0])


def test_masked_zero_weights_and_ragged():
    M, _, _ = problem(5, 6, (2,))
    M[:, 0, 0] = torch.inf
    a = torch.tensor([0, 0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    M.requires_grad_()
    result = ot.solve(M, a, reg=0.3, **TIGHT)
    to_M, = torch.autograd.grad(result.plan.values.square().sum() + result.value.sum(), M)
    assert to_M.isfinite().all() and not to_M[:, 0].any() and to_M.any()
    lengths = torch.tensor([5, 3]), torch.tensor([6, 4])
    ragged = ot.solve(M, reg=0.3, n_len=lengths[0], m_len=lengths[1], **TIGHT)
    to_M, = torch.autograd.grad(ragged.plan.values.square().sum() + ragged.value.sum(), M)
    small = M.detach()[1, :3, :4].clone().requires_grad_()
    alone = ot.solve(small, reg=0.3, **TIGHT)
    want, = torch.autograd.grad(alone.plan.values.square().sum() + alone.value, small)
    torch.testing.assert_close(to_M[1, :3, :4], want)
    assert not to_M[1, 3:].any() and not to_M[1, :, 4:].any()


def test_what_has_no_derivative_says_so():
    M, a, b = marked(*problem())
    result = solved(M, a, b)
    for constant, of in ((result.potentials.alpha, "potentials"), (result.potentials.beta, "potentials"),
                         (result.gap, "gap, marginal_err"), (result.marginal_err, "gap, marginal_err")):
        with pytest.raises(RuntimeError, match=f"{of}.* have no derivative"):
            torch.autograd.grad(constant.sum(), M, retain_graph=True)
    to_a, = torch.autograd.grad(result.value.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in a and b"):
        torch.autograd.grad(to_a.square().sum(), M)
    with pytest.raises(RuntimeError, match="alpha0 asks for a derivative"):
        ot.solve(M.detach(), alpha0=a)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(M.detach(), torch.ones_like(M))
        alpha = ot.solve(dual).potentials.alpha
        assert torch.autograd.forward_ad.unpack_dual(alpha).tangent.isnan().all()
