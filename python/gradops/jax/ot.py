"""Sparse optimal transport in JAX programs, on CPU: under jit and vmap, with gradients of values and plans.

By `jax.pure_callback` into the functions of `gradops.ot`, not by XLA's foreign functions as row_norm is: how many
entries a column may need is known only while solving, and a solver that runs out of room starts again with more. A
solution takes milliseconds, a callback some tens of microseconds.
"""
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.custom_derivatives import SymbolicZero

from .. import ot
from ..ot.plan_vjp import plan_vjp

_DTYPES = ("float64", "float32", "bfloat16", "float16")


class OTSolution(NamedTuple):
    """`gradops.ot.OTResult` as arrays; see there. The plan is dense, and the status a number."""

    plan: jax.Array
    value: jax.Array
    dual_value: jax.Array
    gap: jax.Array
    marginal_err: jax.Array
    ties: jax.Array
    alpha: jax.Array
    beta: jax.Array
    n_iter: jax.Array
    status_code: jax.Array


def solve(M: jax.Array, a: jax.Array | None = None, b: jax.Array | None = None, *, reg: float = 1.0,
          max_nz: int | None = None, tol: float = 1e-6, max_iter: int = 1000) -> OTSolution:
    """`gradops.ot.solve` for matrices of costs ``(..., n, m)`` and weights ``(..., n)``, ``(..., m)``.

    Computed in float64; results are float64 where JAX has it enabled, and otherwise rounded to float32. Differentiable
    once, in reverse mode: ``value`` and ``dual_value`` by the envelope theorem, ``plan`` at fixed support. A derivative
    of anything else raises.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradops.jax import ot
        >>> M = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> jax.grad(lambda M: ot.solve(M, reg=0.1).value)(M).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    _check(M, "M", 2)
    n, m = M.shape[-2:]
    a, b = (jnp.full(k, 1 / k) if t is None else t for t, k in ((a, n), (b, m)))
    _check_weights(M, a=(a, n), b=(b, m))
    batch = np.broadcast_shapes(M.shape[:-2], a.shape[:-1], b.shape[:-1])
    return _solve(jnp.broadcast_to(M, (*batch, n, m)), jnp.broadcast_to(a, (*batch, n)),
                  jnp.broadcast_to(b, (*batch, m)), float(reg), max_nz, float(tol), int(max_iter))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _solve(M, a, b, reg, max_nz, tol, max_iter):
    def run(M, a, b):
        r = ot.solve(_tensor(M), _tensor(a), _tensor(b), reg=reg, max_nz=max_nz, tol=tol, max_iter=max_iter)
        return _arrays(r.plan.to_dense(), r.value, r.dual_value, r.gap, r.marginal_err, r.ties, *r.potentials, r.n_iter,
                       r.status_code)

    real, whole = (_shapes(t) for t in (np.float64, np.int64))
    batch = M.shape[:-2]
    shapes = (real(M.shape), real(batch), real(batch), real(batch), real(batch), real(batch), real(a.shape),
              real(b.shape), whole(batch), whole(batch))
    return OTSolution(*jax.pure_callback(run, shapes, M, a, b, vmap_method="broadcast_all"))


def _solve_forward(M, a, b, reg, max_nz, tol, max_iter):
    out = _solve(M.value, a.value, b.value, reg, max_nz, tol, max_iter)
    return out, (out.plan, out.alpha, out.beta, *_like(M, a, b))


def _solve_backward(reg, max_nz, tol, max_iter, kept, gradients):
    T, alpha, beta, *like = kept
    _refuse("solve", OTSolution(*gradients)._asdict(), ("plan", "value", "dual_value"))
    plan, *values = gradients[:3]
    scale = sum((g for g in values if not isinstance(g, SymbolicZero)), jnp.zeros(T.shape[:-2], T.dtype))
    gradient = (scale[..., None, None] * T, scale[..., None] * alpha, scale[..., None] * beta)
    if not isinstance(plan, SymbolicZero):
        def run(T, g):
            T, g = (_tensor(t).double().mT for t in (T, g))
            rows = torch.arange(T.shape[-1], device=T.device).expand(T.shape)
            r, u, v = plan_vjp(rows, T, g, T.new_zeros(*T.shape[:-2], T.shape[-1]), T.new_zeros(T.shape[:-1]))
            return _arrays(r.mT / -reg, u, v)

        real = _shapes(np.float64)
        more = jax.pure_callback(run, (real(T.shape), real(alpha.shape), real(beta.shape)), T, plan,
                                 vmap_method="broadcast_all")
        gradient = tuple(g + h for g, h in zip(gradient, more, strict=True))
    return tuple(g.astype(t.dtype) for g, t in zip(gradient, like, strict=True))


_solve.defvjp(_solve_forward, _solve_backward, symbolic_zeros=True)


def semidual(alpha: jax.Array, M: jax.Array, a: jax.Array, b: jax.Array, reg: float, max_nz: int | None = None,
             ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`gradops.ot.semidual`: the value, its gradient, the plan, here dense, and the thresholds.

    Computed in float64; results are float64 where JAX has it enabled, and otherwise rounded to float32. The value is
    differentiable once, in reverse mode; a derivative of anything else raises.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradops.jax import ot
        >>> M, half = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.full(2, 0.5)
        >>> value, gradient, plan, tau = ot.semidual(jnp.zeros(2), M, half, half, 1.0, 1)
        >>> value.item(), gradient.tolist()
        (0.25, [0.0, 0.0])
    """
    _check(M, "M", 2)
    n, m = M.shape[-2:]
    _check_weights(M, alpha=(alpha, n), a=(a, n), b=(b, m))
    batch = np.broadcast_shapes(M.shape[:-2], alpha.shape[:-1], a.shape[:-1], b.shape[:-1])
    shapes = ((*batch, n), (*batch, n, m), (*batch, n), (*batch, m))
    alpha, M, a, b = (jnp.broadcast_to(t, s) for t, s in zip((alpha, M, a, b), shapes, strict=True))
    return _semidual(alpha, M, a, b, float(reg), max_nz)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _semidual(alpha, M, a, b, reg, max_nz):
    def run(alpha, M, a, b):
        value, gradient, plan, tau = ot.semidual(_tensor(alpha), _tensor(M), _tensor(a), _tensor(b), reg, max_nz)
        return _arrays(value, gradient, plan.to_dense(), tau)

    real = _shapes(np.float64)
    shapes = (real(M.shape[:-2]), real(a.shape), real(M.shape), real(b.shape))
    return tuple(jax.pure_callback(run, shapes, alpha, M, a, b, vmap_method="broadcast_all"))


def _semidual_forward(alpha, M, a, b, reg, max_nz):
    out = _semidual(alpha.value, M.value, a.value, b.value, reg, max_nz)
    return out, (alpha.value, *out[1:], *_like(alpha, M, a, b))


def _semidual_backward(reg, max_nz, kept, gradients):
    alpha, gradient, T, tau, *like = kept
    _refuse("semidual", dict(zip(("value", "gradient", "plan", "tau"), gradients, strict=True)), ("value",))
    scale = gradients[0]
    if isinstance(scale, SymbolicZero):
        scale = jnp.zeros(scale.shape, scale.dtype)
    parts = (scale[..., None] * gradient, scale[..., None, None] * T, scale[..., None] * alpha, scale[..., None] * -tau)
    return tuple(g.astype(t.dtype) for g, t in zip(parts, like, strict=True))


_semidual.defvjp(_semidual_forward, _semidual_backward, symbolic_zeros=True)


def _like(*arguments: Any) -> list[jax.Array]:
    """Empty arrays that remember dtypes."""
    return [jnp.zeros(0, t.value.dtype) for t in arguments]


def _refuse(function: str, gradients: dict[str, Any], known: tuple[str, ...]) -> None:
    for name, g in gradients.items():
        if name not in known and not isinstance(g, SymbolicZero) and jnp.issubdtype(g.dtype, jnp.floating):
            raise TypeError(f"{function}: {name} has no derivative in JAX; take jax.lax.stop_gradient of it")


def _check(x: Any, name: str, dims: int) -> None:
    if getattr(getattr(x, "dtype", None), "name", None) not in _DTYPES:
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name} must be a float64, float32, bfloat16 or float16 array, got {got}")
    if x.ndim < dims:
        raise ValueError(f"{name} must have at least {dims} dimensions, got shape {x.shape}")


def _check_weights(M: jax.Array, **weights: tuple[jax.Array, int]) -> None:
    for name, (t, size) in weights.items():
        _check(t, name, 1)
        if t.shape[-1] != size:
            raise ValueError(f"{name} must have {size} entries for M of shape {M.shape}, got shape {t.shape}")


def _tensor(x: Any) -> torch.Tensor:
    y = np.asarray(x)
    return torch.from_numpy(np.array(y if y.dtype in (np.float64, np.float32, np.float16) else y.astype(np.float32)))


def _arrays(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(t.numpy(), jax.dtypes.canonicalize_dtype(t.numpy().dtype)) for t in tensors)


def _shapes(dtype: type) -> Any:
    return lambda shape: jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))
