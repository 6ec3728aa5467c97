"""The kernels on NumPy arrays (float64, float32, float16), without going through torch. CPU only."""
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _numpy  # type: ignore[attr-defined]
from .linalg._spectrum import check_filter, factors, gram_suffices
from .linalg.coefficients import resolve, with_margin

Array = NDArray[np.floating]
isa = _numpy.isa


def set_num_threads(n: int) -> None:
    """How many threads these functions may use; all of the machine's by default."""
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    _numpy.set_num_threads(n)


def _matrix(x: Array, name: str) -> Array:
    x = np.asarray(x)
    if x.dtype not in (np.float64, np.float32, np.float16):
        raise TypeError(f"{name} must be float64, float32 or float16, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (..., m, n), got shape {x.shape}")
    return np.ascontiguousarray(x)


def newton_schulz(x: Array, steps: int = 5, *, coefficients: str | Sequence[Sequence[float]] = "polar_express",
                  eps: float = 1e-7) -> Array:
    """`gradops.linalg.newton_schulz` in the array's own precision (float16 in float32).

    Example:
        >>> import numpy as np
        >>> from gradops.numpy import newton_schulz
        >>> q = newton_schulz(np.random.default_rng(0).standard_normal((2, 16, 64)), steps=8)
        >>> bool(np.abs(np.linalg.svd(q, compute_uv=False) - 1).max() < 1e-3)
        True
    """
    x = _matrix(x, "x")
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")
    if isinstance(coefficients, str) and coefficients == "aol":
        raise ValueError("coefficients='aol' is not available for arrays; use gradops.linalg.newton_schulz")
    table = with_margin(resolve(coefficients, steps), eps)
    y = np.empty_like(x)
    _numpy.newton_schulz(x, y, [k for abc in table for k in abc])
    return y


def row_norm(x: Array, *, eps: float = 1e-8, center: bool = False) -> Array:
    """`gradops.linalg.row_norm`.

    Example:
        >>> import numpy as np
        >>> from gradops.numpy import row_norm
        >>> row_norm(np.array([[3.0, 4.0], [0.0, 2.0]]), eps=0.0)
        array([[0.6, 0.8],
               [0. , 1. ]])
    """
    x = _matrix(x, "x")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    y = np.empty_like(x)
    _numpy.row_norm(x, y, eps, center)
    return y


def nuclear_scale(M: Array, U: Array) -> Array:
    """`gradops.linalg.nuclear_scale`; always float64.

    Example:
        >>> import numpy as np
        >>> from gradops.numpy import nuclear_scale
        >>> float(nuclear_scale(np.diag([2.0, 3.0]), np.eye(2)))
        5.0
    """
    M, U = _matrix(M, "M"), _matrix(U, "U")
    if M.shape != U.shape or M.dtype != U.dtype:
        raise ValueError(f"U must have the shape and dtype of M, {M.shape} {M.dtype}, got {U.shape} {U.dtype}")
    out = np.empty(M.shape[:-2])
    _numpy.nuclear_scale(M, U, out)
    return out


def gram(J: Array, *, accumulate: type[np.floating] = np.float64) -> Array:
    """`gradops.linalg.gram` of one array; `accumulate` is np.float64 or np.float32.

    Example:
        >>> import numpy as np
        >>> from gradops.numpy import gram
        >>> gram(np.array([[3.0, 4.0], [1.0, 0.0]], np.float32))
        array([[25.,  3.],
               [ 3.,  1.]])
    """
    if isinstance(J, (list, tuple)) and any(isinstance(x, np.ndarray) and x.ndim > 1 for x in J):
        raise TypeError(f"J must be one array, got a {type(J).__name__} of them: add up their Gram matrices")
    J, dtype = _matrix(J, "J"), np.dtype(accumulate)
    if dtype not in (np.float64, np.float32):
        raise ValueError(f"accumulate must be np.float64 or np.float32, got {accumulate!r}")
    if dtype == np.float32 and J.dtype == np.float64:
        raise ValueError("accumulate must be np.float64 for a float64 J, got np.float32")
    G = np.zeros((*J.shape[:-1], J.shape[-2]), dtype)
    if G.size and J.size:
        _numpy.gram(J, G, dtype == np.float64)
    return G


def spectral_solve(G: Array, r: Array, *, k: int | None = None, rtol: float = 1e-3, atol: float = 1e-10,
                   filter: str = "hard", damping: float = 0.0, power: float = 1.0) -> tuple[Array, Array, Any]:
    """`gradops.linalg.spectral_solve`: w, sigma and rank.

    Example:
        >>> import numpy as np
        >>> from gradops.numpy import spectral_solve
        >>> spectral_solve(np.diag([4.0, 1.0, 1e-8]), np.ones(3))[0]
        array([0.25, 1.  , 0.  ])
    """
    G, r = _matrix(G, "G").astype(np.float64), np.asarray(r, np.float64)
    if G.shape[-1] != G.shape[-2]:
        raise ValueError(f"G must be square (..., B, B), got shape {G.shape}")
    _check_rows(r, "r", G, "G")
    check_filter(k, rtol, atol, filter, damping, power)
    if G.size == 0:
        return np.zeros(r.shape), np.zeros(r.shape), np.zeros(r.shape[:-1], np.int64)
    finite: Any = np.isfinite(G).all((-2, -1)) & np.isfinite(r).all(-1)
    values, q = np.linalg.eigh(np.where(finite[..., None, None], G, 0))
    with np.errstate(over="ignore"):
        sigma, factor, kept = factors(np, np.maximum(values[..., ::-1], 0), -1 if k is None else k, rtol, atol, filter,
                                      damping, power)
    w = _times(q, factor[..., ::-1] * _times(np.swapaxes(q, -1, -2), np.where(finite[..., None], r, 0)))
    nan = np.where(finite, 0, np.nan)[..., None]
    return w + nan, sigma + nan, np.where(finite, kept.sum(-1), -1)


def pinv_apply(J: Array, r: Array, *, k: int | None = None, rtol: float = 1e-3) -> Array:
    """`gradops.linalg.pinv_apply` of one array, by its method "auto".

    Example:
        >>> import numpy as np
        >>> from gradops.numpy import pinv_apply
        >>> pinv_apply(np.array([[2.0, 0.0, 0.0], [0.0, 1e-5, 0.0]]), np.ones(2))
        array([0.5, 0. , 0. ])
    """
    J, r = _matrix(J, "J"), np.asarray(r, np.float64)
    _check_rows(r, "r", J, "J")
    check_filter(k, rtol)
    if J.size == 0:
        return np.zeros((*J.shape[:-2], J.shape[-1]), J.dtype)
    options: dict[str, Any] = {"k": k, "rtol": rtol, "atol": 0.0}
    if not gram_suffices(rtol, J.dtype == np.float64):
        return _apply(J, _by_svd(J, r, k, rtol))
    if J.shape[-1] >= J.shape[-2]:
        return _apply(J, spectral_solve(gram(J), r, **options)[0])
    g = gram(np.swapaxes(np.concatenate([J, r[..., None]], -1), -1, -2))
    return spectral_solve(g[..., :-1, :-1], g[..., :-1, -1], **options)[0].astype(J.dtype)


def _check_rows(x: Array, name: str, y: Array, other: str) -> None:
    if x.shape != y.shape[:-1]:
        raise ValueError(f"{name} must have the shape of {other} less the last dimension, {y.shape[:-1]}, "
                         f"got {x.shape}")


def _times(m: Array, x: Array) -> Array:
    return (m @ x[..., None])[..., 0]


def _apply(J: Array, w: Array) -> Array:
    y = np.empty((*J.shape[:-2], J.shape[-1]), J.dtype)
    _numpy.jt_apply(J, np.ascontiguousarray(w), y)
    return y


def _by_svd(J: Array, r: Array, k: int | None, rtol: float) -> Array:
    """w, through the triangular factor of J^T."""
    bad: Any = ~np.isfinite(J).all((-2, -1))
    triangle = np.linalg.qr(np.swapaxes(np.where(bad[..., None, None], 0, J).astype(np.float64), -1, -2), mode="r")
    _, sigma, vh = np.linalg.svd(triangle, full_matrices=False)
    _, factor, _ = factors(np, sigma**2, -1 if k is None else k, rtol, 0.0, "hard", 0.0, 1.0)
    return np.where(bad[..., None], np.nan, _times(np.swapaxes(vh, -1, -2), factor * _times(vh, r)))
