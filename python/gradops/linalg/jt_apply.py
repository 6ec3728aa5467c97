"""A weighted sum of the rows of a wide matrix."""
from typing import Any

import torch
from torch import Tensor

from .._compiler import allow_in_graph
from .._op import KeepsInputs, needs_derivative, primals, register
from ._blocks import Blocks, check_blocks, check_rows

_op = register("jt_apply", fake=lambda J, w: J.new_empty((*J.shape[:-2], J.shape[-1])))


@allow_in_graph
def jt_apply(J: Blocks, w: Tensor) -> Tensor | list[Tensor]:
    r"""Applies the transpose of a matrix to a vector.

    .. math:: y = J^\top w = \sum_b w_b J_b

    Args:
        J: ``(..., B, P)``, or a list of blocks of its columns ``(..., B, P_l)``; float64, float32, bfloat16 or float16.
        w: ``(..., B)``; any of these dtypes.

    Returns:
        ``(..., P)`` of the dtype of ``J``, or a list of them, block by block.

    Raises:
        TypeError: ``J`` or ``w`` is no dense real floating-point tensor.
        ValueError: a shape or a device does not fit.

    Products and sums are in float64 on both devices, which costs nothing, since ``J`` is read once from memory
    whatever the sums: ``w`` may hold large numbers that cancel, as after a division by small singular values.
    Differentiable to any order, in the dtype of ``J``.

    Example:
        >>> import torch
        >>> from gradops.linalg import jt_apply
        >>> jt_apply(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([1.0, -2.0]))
        tensor([1., 4.])
    """
    blocks = check_blocks(J, "J")
    check_rows(w, "w", blocks)
    call = _JtApply.apply if needs_derivative(w, *blocks) else _op
    out = [call(x, w.double()) for x in blocks]
    return out[0] if isinstance(J, Tensor) else out


class _JtApply(KeepsInputs):
    @staticmethod
    def forward(J: Tensor, w: Tensor) -> Tensor:
        return _op(J, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        J, w = ctx.saved_tensors
        dtype = J.dtype if J.dtype.itemsize > 2 else torch.float32
        dJ = dw = None
        if ctx.needs_input_grad[0]:
            dJ = (w.to(dtype)[..., :, None] * grad.to(dtype)[..., None, :]).to(J.dtype)
        if ctx.needs_input_grad[1]:
            dw = (J.to(dtype) @ grad.to(dtype)[..., None])[..., 0].to(w.dtype)
        return dJ, dw

    @staticmethod
    def jvp(ctx: Any, dJ: Tensor | None, dw: Tensor | None):
        J, w = primals(ctx.saved_tensors)
        terms = [_JtApply.apply(*pair) for pair in ((dJ, w), (J, dw)) if all(t is not None for t in pair)]
        return sum(terms[1:], terms[0])
