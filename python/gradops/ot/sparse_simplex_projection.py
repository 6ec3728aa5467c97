"""Projection onto sparse vectors of the simplex."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_number
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, register
from ._problem import check_max_nz


def _fake(X, z, width):
    values = X.new_empty(*X.shape[:-1], width)
    return values, values.new_empty(values.shape, dtype=torch.int64), X.new_empty(X.shape[:-1])


_op = register("sparse_simplex_projection", fake=_fake)


@allow_in_graph
def sparse_simplex_projection(X: Tensor, max_nz: int | None = None, z: float | Tensor = 1.0, dim: int = -1
                              ) -> tuple[Tensor, Tensor, Tensor]:
    r"""The nearest vector of the simplex with at most ``max_nz`` positive entries, to each vector along ``dim``.

    .. math:: \arg\min_t \{\|t - x\|^2 : t \ge 0, \textstyle\sum_i t_i = z, \|t\|_0 \le k\}
        = (x - \tau)_+ \text{ on the k largest entries of } x

    Args:
        X: vectors along ``dim``; float64, float32, bfloat16 or float16. ``-inf`` for entries that must stay 0.
        max_nz: the most positive entries k; None: no bound.
        z: what the entries sum to, positive: a number, or a tensor that can be broadcast to X without ``dim``.
        dim: along which vectors lie.

    Returns:
        ``(values, indices, tau)``. ``values`` and ``indices`` have min(max_nz, size) entries along ``dim``: the
        positive ones, of equal entries of x those with the lowest indices, and where there are fewer, zeros with the
        lowest indices of the rest. Indices ascend, so that without ``max_nz`` ``values`` is the projection itself.
        ``tau`` is the threshold, of the shape of X without ``dim``. ``values`` and ``tau`` have X's dtype; arithmetic
        is in float64. A vector with NaN or ``+inf``, or without a finite entry, gives NaN.

    Raises:
        TypeError: X or z is no dense real floating-point tensor.
        ValueError: shapes do not fit, ``max_nz`` is not positive, a vector is empty, or, on CPU, z is not positive and
            finite (on CUDA that gives NaN).

    Differentiable to any order in X and z, in both modes, with the support held fixed: exact where no entry is at the
    threshold and no two tie for the last place, else one of the one-sided derivatives.

    Kyrillidis, Becker, Cevher and Koch (ICML 2013), "Sparse projections onto the simplex", algorithm 1; without
    ``max_nz``, Held, Wolfe and Crowder (1974). One pass for a bound, one that collects what is above it.

    Example:
        >>> import torch
        >>> from gradops.ot import sparse_simplex_projection
        >>> sparse_simplex_projection(torch.tensor([0.5, 1.0, 0.25, 0.75]), max_nz=2)
        (tensor([0.6250, 0.3750]), tensor([1, 3]), tensor(0.3750))
    """
    check_floating(X, "X")
    if X.dim() == 0:
        raise ValueError("X must have at least 1 dimension, got none")
    if not -X.dim() <= dim < X.dim():
        raise ValueError(f"dim must be in [{-X.dim()}, {X.dim()}), got {dim}")
    check_max_nz(max_nz)
    X = X.movedim(dim, -1)
    if X.shape[-1] == 0:
        raise ValueError(f"X must have at least one entry along dim, got shape {tuple(X.shape)}")
    if isinstance(z, Tensor):
        check_floating(z, "z")
        check_device(z, "z", X, "X")
        try:
            z = z.to(torch.float64).expand(X.shape[:-1])
        except RuntimeError:
            raise ValueError(f"z must be broadcastable to X without dim, {tuple(X.shape[:-1])}, got shape "
                             f"{tuple(z.shape)}") from None
    else:
        check_number(z, "z")
        if not 0 < z < float("inf"):
            raise ValueError(f"z must be finite and positive, got {z}")
        z = X.new_full(X.shape[:-1], z, dtype=torch.float64)
    width = X.shape[-1] if max_nz is None else min(max_nz, X.shape[-1])
    if needs_derivative(X, z):
        index, positive = _Support.apply(X, z, width)
        values, tau = _on_support(X, z, index, positive)
    else:
        values, index, tau = _op(X, z, width)
    return values.movedim(-1, dim), index.movedim(-1, dim), tau


class _Support(Function):
    """Which entries are positive; whole numbers, without derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor, z: Tensor, width: int) -> tuple[Tensor, Tensor]:
        values, index, _ = _op(X, z, width)
        return index, (values != 0).to(torch.int64)  # NaN too

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_):
        return None, None, None

    @staticmethod
    def jvp(ctx: Any, *_):
        return None, None


def _on_support(X: Tensor, z: Tensor, index: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    entries = X.gather(-1, index).to(torch.float64)
    used = positive > 0
    top = entries.detach().amax(-1, keepdim=True)
    relative = torch.where(used, entries - top, 0.0)
    size = positive.sum(-1, keepdim=True).clamp(min=1)
    tau = (relative.sum(-1, keepdim=True) - z[..., None]) / size
    values = torch.where(used, relative - tau, 0.0)
    return values.to(X.dtype), (top + tau).squeeze(-1).to(X.dtype)
