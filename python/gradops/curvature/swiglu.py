"""The gated activation of feed-forward layers, with derivatives of two orders."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_floating, check_like
from .._compiler import allow_in_graph
from .._op import register
from ._second_order import Kernels, Maybe, Values, differentiable


def _like(gate: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _wanted(gate: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    d_gate, d_up = (_like(gate) if wanted >> i & 1 else gate.new_empty(0) for i in range(2))
    return d_gate, d_up


_forward = register("swiglu", fake=lambda gate, up: _like(gate))
_jvp = register("swiglu_jvp", fake=lambda gate, *_: _like(gate))
_dual = register("swiglu_dual", fake=lambda gate, *_: (_like(gate), _like(gate)))
_backward = register("swiglu_backward", fake=lambda gate, up, g, wanted: _wanted(gate, wanted))
_backward_jvp = register("swiglu_backward_jvp", fake=lambda gate, *rest: _wanted(gate, rest[-1]))
_backward_dual = register("swiglu_backward_dual",
                          fake=lambda gate, *rest: (*_wanted(gate, rest[-1]), *_wanted(gate, rest[-1])))


def _bits(wanted: Any) -> int:
    return wanted[0] | wanted[1] << 1


def _dual_lists(x: Values, c: Values, x_dot: Values) -> tuple[list[Tensor], list[Tensor]]:
    y, y_dot = _dual(*x, *x_dot)
    return [y], [y_dot]


def _backward_dual_lists(x: Values, c: Values, out: Values, g: Tensor, x_dot: Values, out_dot: Values, g_dot: Maybe,
                         wanted: Any) -> tuple[list[Tensor], list[Tensor]]:
    d_gate, d_up, d_gate_dot, d_up_dot = _backward_dual(*x, g, *x_dot, g_dot, _bits(wanted))
    return [d_gate, d_up], [d_gate_dot, d_up_dot]


_call = differentiable("swiglu", Kernels(
    forward=lambda x, c: [_forward(*x)],
    backward=lambda x, c, out, g, wanted: _backward(*x, g, _bits(wanted)),
    jvp=lambda x, c, out, x_dot: [_jvp(*x, *x_dot)],
    backward_jvp=lambda x, c, out, g, x_dot, out_dot, g_dot, wanted: _backward_jvp(*x, g, *x_dot, g_dot, _bits(wanted)),
    dual=_dual_lists, backward_dual=_backward_dual_lists,
), inputs=2, constants=0)  # fmt: skip


@allow_in_graph
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    r"""Multiplies by the SiLU of a gate.

    .. math:: y = \operatorname{silu}(\text{gate}) \cdot \text{up}, \qquad \operatorname{silu}(x) = \frac{x}{1 + e^{-x}}

    Args:
        gate: any shape; float64, float32, bfloat16 or float16; the halves of one tensor, as ``x.chunk(2, -1)`` gives
            them, are read in place. Not modified.
        up: shape and dtype of ``gate``; None for the SiLU alone. Not modified.

    Returns:
        A new contiguous tensor like ``gate``, computed in float32 (float64 if that is the dtype) and rounded once.

    Raises:
        TypeError: ``gate`` is no dense real floating-point tensor, or ``up`` has another dtype.
        ValueError: ``up`` has another shape, or is on another device.

    Two orders of derivatives, in every mode; no more than the inputs is kept for them, and each is one pass over what
    it needs. Torch keeps the SiLU as well, and differentiates twice in about ten passes.

    Source: N. Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    Example:
        >>> import torch
        >>> from gradops.curvature import swiglu
        >>> swiglu(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([ 0.0000,  1.4621, -0.8068])
    """
    check_floating(gate, "gate")
    if up is not None:
        check_like(up, "up", gate, "gate")
        if up.dtype != gate.dtype:
            raise TypeError(f"up must have the dtype of gate, {gate.dtype}, got {up.dtype}")
    return _call(gate, up)
