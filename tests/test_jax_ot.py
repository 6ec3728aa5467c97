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
