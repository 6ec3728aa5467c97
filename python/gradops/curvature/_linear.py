"""F.linear with fused passes for forward over reverse.

A product with a Hessian needs the change of a weight's gradient, not the gradient: where a weight is a parameter
itself, that product is left out, which neither torch's forward mode nor double backward can do.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._second_order import Kernels, Maybe, Values, differentiable


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _shaped(t: Tensor, like: Tensor) -> Tensor:
    return torch.ops.aten._unsafe_view(t, like.shape)  # type: ignore[no-any-return]  # what a model may write over


def _sum(*pairs: tuple[Maybe, Maybe]) -> Maybe:
    """The sum of the products of two matrices, of those pairs of which neither is zero (None)."""
    out: Maybe = None
    for a, b in pairs:
        if a is not None and b is not None:
            out = a @ b if out is None else out.addmm_(a, b)
    return out


def _transposed(t: Maybe) -> Maybe:
    return None if t is None else t.mT


def _forward(x: Values, c: Values) -> list[Tensor]:
    return [F.linear(*x)]


def _jvp(x: Values, c: Values, out: Values, x_dot: Values) -> list[Tensor]:
    h, w, _ = x
    h_dot, w_dot, b_dot = x_dot
    y_dot = _sum((None if h_dot is None else _rows(h_dot), w.mT), (_rows(h), _transposed(w_dot)))
    if y_dot is None:
        return [b_dot.expand_as(out[0]).contiguous() if b_dot is not None else torch.zeros_like(out[0])]
    return [_shaped(y_dot if b_dot is None else y_dot.add_(b_dot), out[0])]


def _dual(x: Values, c: Values, x_dot: Values) -> tuple[list[Tensor], list[Tensor]]:
    out = _forward(x, c)
    return out, _jvp(x, c, out, x_dot)


def _backward(x: Values, c: Values, out: Values, g: Tensor, wanted: Sequence[bool]) -> list[Maybe]:
    h, w, _ = x
    g2 = _rows(g)
    return [_shaped(g2 @ w, h) if wanted[0] else None, g2.mT @ _rows(h) if wanted[1] else None,
            g2.sum(0) if wanted[2] else None]


def _backward_jvp(
    x: Values, c: Values, out: Values, g: Tensor, x_dot: Values, out_dot: Values, g_dot: Maybe, wanted: Sequence[bool]
) -> list[Maybe]:  # fmt: skip
    h, w, _ = x
    h_dot, w_dot, _ = x_dot
    g, g_dot = _rows(g), None if g_dot is None else _rows(g_dot)
    dh = _sum((g_dot, w), (g, w_dot)) if wanted[0] else None
    dw = _sum((_transposed(g_dot), _rows(h)), (g.mT, None if h_dot is None else _rows(h_dot))) if wanted[1] else None
    db = g_dot.sum(0) if wanted[2] and g_dot is not None else None
    found = [None if dh is None else _shaped(dh, h), dw, db]
    shapes = h.shape, w.shape, w.shape[:1]
    return [g.new_zeros(s) if t is None and flag else t for t, s, flag in zip(found, shapes, wanted, strict=True)]


def _backward_dual(
    x: Values, c: Values, out: Values, g: Tensor, x_dot: Values, out_dot: Values, g_dot: Maybe, wanted: Sequence[bool]
) -> tuple[list[Maybe], list[Maybe]]:  # fmt: skip
    dots = _backward_jvp(x, c, out, g, x_dot, out_dot, g_dot, wanted)
    values = _backward(x, c, out, g, [w and not unused for w, unused in zip(wanted, c, strict=True)])
    # In place of a gradient that is not used goes its change, which takes no more memory.
    for i, unused in enumerate(c):
        if wanted[i] and unused:
            values[i] = dots[i].detach()  # type: ignore[union-attr]
    return values, dots


# x (..., n), weight (m, n), bias (m,) or None, and for each of them whether the value of its gradient is unused
linear = differentiable("linear", Kernels(_forward, _backward, _jvp, _backward_jvp, _dual, _backward_dual),
                        inputs=3, constants=3)
