"""The kernels on NumPy arrays (float64, float32, float16), without going through torch. CPU only."""
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import _numpy  # type: ignore[attr-defined]
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
