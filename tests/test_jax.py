from importlib.util import find_spec

import numpy as np
import pytest
import torch

from gradops import linalg

jax = pytest.importorskip("jax")
if find_spec("gradops._jax") is None:
    pytest.skip("built without JAX", allow_module_level=True)
jnp = jax.numpy


@pytest.fixture(scope="module")
def ops():
    from gradops import jax as module
    return module


def array(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_same_as_torch(ops):
    x = array(3, 20, 33)
    np.testing.assert_allclose(jax.jit(lambda t: ops.row_norm(t, center=True))(x),
                               linalg.row_norm(torch.from_numpy(x), center=True), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.jit(ops.newton_schulz, static_argnums=1)(x, 6),
                               linalg.newton_schulz(torch.from_numpy(x), 6, precision="highest"), atol=1e-6)
    y = ops.newton_schulz(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    want = linalg.newton_schulz(torch.from_numpy(x).bfloat16()).float()
    np.testing.assert_allclose(np.asarray(y, np.float32), want, atol=0.02)


def test_vmap(ops):
    x = array(4, 5, 6)
    for f in (ops.row_norm, ops.newton_schulz):
        np.testing.assert_allclose(jax.vmap(f, in_axes=1)(x), jnp.stack([f(x[:, i]) for i in range(5)]), atol=1e-6)


@pytest.mark.parametrize("center", [False, True])
def test_gradient(ops, center):
    def plain(x):
        y = x - x.mean(-2, keepdims=True) if center else x
        y = y / (jnp.linalg.norm(y, axis=-1, keepdims=True) + 0.1)
        return y - y.mean(-2, keepdims=True) if center else y

    x = array(5, 7)
    ours = jax.jit(jax.grad(lambda t: (ops.row_norm(t, eps=0.1, center=center)**3).sum()))(x)
    np.testing.assert_allclose(ours, jax.grad(lambda t: (plain(t)**3).sum())(x), rtol=1e-4, atol=1e-6)
    with pytest.raises(Exception, match=r"[Dd]ifferentiat"):
        jax.grad(lambda t: ops.newton_schulz(t).sum())(x)


def test_gram_and_what_is_solved_through_it(ops):
    J, r = array(2, 12, 300), array(2, 12)
    tj, tr = torch.from_numpy(J), torch.from_numpy(r)
    G = linalg.gram(tj)
    np.testing.assert_allclose(jax.jit(ops.gram)(J), G, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(jax.jit(ops.pinv_apply)(J, r), linalg.pinv_apply(tj, tr), rtol=1e-5, atol=1e-8)
    w, sigma, rank = jax.jit(lambda G, r: ops.spectral_solve(G, r, k=5))(G.numpy(), r)
    exact = linalg.spectral_solve(G, tr, k=5)
    np.testing.assert_allclose(w, exact[0], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(sigma, exact[1], rtol=1e-5)
    assert rank.tolist() == exact[2].tolist()
    half = ops.pinv_apply(jnp.asarray(J, jnp.bfloat16), r)
    assert half.dtype == jnp.bfloat16 and np.isfinite(np.asarray(half, np.float32)).all()
    small = array(2, 12, 5)
    np.testing.assert_allclose(jax.vmap(ops.gram, in_axes=1)(small), [ops.gram(small[:, i]) for i in range(12)],
                               atol=1e-6)
    np.testing.assert_allclose(jax.vmap(ops.pinv_apply, in_axes=(0, None))(small, r[0]),
                               [ops.pinv_apply(x, r[0]) for x in small], atol=1e-6)
    ours = jax.grad(lambda x: (ops.gram(x)**2).sum())(small)
    want = jax.grad(lambda x: ((x @ jnp.swapaxes(x, -1, -2))**2).sum())(small)
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)
    with (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True):
        x = jnp.asarray(array(6, 40), jnp.float64)
        assert ops.gram(jnp.asarray(x, jnp.float32)).dtype == jnp.float64
        np.testing.assert_allclose(x @ ops.pinv_apply(x, x[:, 0], rtol=1e-6), x[:, 0], rtol=1e-9, atol=1e-9)
    with pytest.raises(Exception, match=r"[Dd]ifferentiat|JVP"):
        jax.grad(lambda t: ops.pinv_apply(t, r).sum())(J)


def test_bad_input(ops):
    with pytest.raises(ValueError, match="r must have the shape of J"):
        ops.pinv_apply(jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        ops.row_norm(jnp.ones(3))
    with pytest.raises(TypeError, match="x must be float64"):
        ops.newton_schulz(jnp.ones((2, 2), jnp.int32))
