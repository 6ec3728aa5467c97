from importlib.util import find_spec

import numpy as np
import pytest
import torch

from gradops import ot as ours

jax = pytest.importorskip("jax")
if find_spec("gradops._jax") is None:
    pytest.skip("built without JAX", allow_module_level=True)
jnp = jax.numpy


@pytest.fixture(scope="module")
def ot():
    from gradops.jax import ot as module
    return module


@pytest.fixture
def wide():
    with (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True):
        yield


def problem(*batch, n=7, m=5):
    rng = np.random.default_rng(0)
    a, b = rng.random((*batch, n)) + 0.1, rng.random((*batch, m)) + 0.1
    return rng.random((*batch, n, m)), a / a.sum(-1, keepdims=True), b / b.sum(-1, keepdims=True)


def test_semidual(ot, wide):
    M, a, b = problem(3)
    alpha = np.random.default_rng(1).random(a.shape)
    tensors = [torch.from_numpy(t).requires_grad_() for t in (alpha, M, a, b)]
    value, gradient, plan, tau = ours.semidual(*tensors, 0.1, 2)
    got = jax.jit(lambda *t: ot.semidual(*t, 0.1, 2))(alpha, M, a, b)
    for x, y in zip(got, (value, gradient, plan.to_dense(), tau), strict=True):
        np.testing.assert_allclose(x, y.detach(), rtol=1e-12)
    want = torch.autograd.grad(value.square().sum(), tensors)
    got = jax.jit(jax.grad(lambda *t: (ot.semidual(*t, 0.1, 2)[0]**2).sum(), (0, 1, 2, 3)))(alpha, M, a, b)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)
    each = jax.vmap(lambda M, a: ot.semidual(alpha[0], M, a, b[0], 0.1)[0], in_axes=(0, 0))(M, a)
    np.testing.assert_allclose(each, [ot.semidual(alpha[0], x, y, b[0], 0.1)[0] for x, y in zip(M, a, strict=True)])
    with pytest.raises(TypeError, match="tau has no derivative in JAX"):
        jax.grad(lambda t: ot.semidual(t, M, a, b, 0.1)[3].sum())(alpha)


@pytest.mark.parametrize("max_nz", [None, 2])
def test_solve(ot, wide, max_nz):
    M, a, b = problem(2)
    tensors = [torch.from_numpy(t).requires_grad_() for t in (M, a, b)]
    want = ours.solve(*tensors, reg=0.5, max_nz=max_nz, max_iter=50)
    f = jax.jit(lambda *t: ot.solve(*t, reg=0.5, max_nz=max_nz, max_iter=50))
    got = f(M, a, b)
    np.testing.assert_array_equal(got.plan, want.plan.to_dense().detach())
    for name in ("value", "dual_value", "gap", "marginal_err", "n_iter", "status_code"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name).detach())
    np.testing.assert_array_equal(got.beta, want.potentials.beta.detach())
    weights = np.random.default_rng(2).random(M.shape)
    for of in (lambda r, plan, w: (r.value**2).sum(),
               lambda r, plan, w: (plan**2 * w).sum() + r.dual_value.sum()):
        expected = torch.autograd.grad(of(want, want.plan.to_dense(), torch.from_numpy(weights)), tensors,
                                       retain_graph=True)
        gradient = jax.jit(jax.grad(lambda *t, of=of: of(f(*t), f(*t).plan, weights), (0, 1, 2)))(M, a, b)
        for x, y in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_solve_without_float64_under_vmap_and_where_it_refuses(ot):
    M, _, _ = (t.astype(np.float32) for t in problem(3))
    each = jax.vmap(lambda M: ot.solve(M, reg=0.5))(M)
    assert each.plan.dtype == jnp.float32 and each.status_code.tolist() == [0, 0, 0]
    np.testing.assert_allclose(each.value, ours.solve(torch.from_numpy(M), reg=0.5).value, rtol=1e-6)
    half = jax.grad(lambda M: ot.solve(M, reg=0.5).value)(jnp.asarray(M[0], jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and half.any()
    with pytest.raises(TypeError, match="alpha has no derivative in JAX"):
        jax.grad(lambda M: ot.solve(M).alpha[0])(M[0])
    with pytest.raises(ValueError, match="a must have 7 entries"):
        ot.solve(M, jnp.ones(6))
    with pytest.raises(TypeError, match="M must be a float64"):
        ot.solve([[0.0]])
