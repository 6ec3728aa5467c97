"""The Gram matrix of the rows of a wide matrix."""
from typing import Any

import torch
from torch import Tensor

from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, primals, register
from ._blocks import Blocks, check_blocks

_op = register("gram", fake=lambda J, wide: J[0].new_empty(
    (*J[0].shape[:-1], J[0].shape[-2]), dtype=torch.float64 if wide else torch.float32))


@allow_in_graph
def gram(J: Blocks, *, accumulate: torch.dtype | None = None) -> Tensor:
    r"""Inner products of all pairs of rows.

    .. math:: G = J J^\top = \sum_l J_l J_l^\top

    Squared singular values need the digits: of a float32 ``J``, products and sums in float64 show singular values down
    to 1e-7 of the largest, those in float32 only down to about 1e-3. Exactly symmetric.

    Args:
        J: ``(..., B, P)``, or a list of blocks of its columns ``(..., B, P_l)``, which are never concatenated;
            float64, float32, bfloat16 or float16. Not modified.
        accumulate: dtype of products, sums and result: ``torch.float64``, the default, or ``torch.float32``.

    Returns:
        ``(..., B, B)``.

    Raises:
        TypeError: ``J`` is no dense real floating-point tensor, or a list with something else in it.
        ValueError: a tensor has fewer than 2 dimensions, blocks do not fit together, the list is empty, ``accumulate``
            is none of the above, or it is float32 and a block is float64.

    Half the :math:`2 B^2 P` operations of a product of two different matrices; numbers are widened on their way into
    the cache. All blocks go in one call, on CUDA 32 of them in one launch. Differentiable to any order, in the dtype
    of ``J``.

    Example:
        >>> import torch
        >>> from gradops.linalg import gram
        >>> gram(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([[25.,  3.],
                [ 3.,  1.]], dtype=torch.float64)
    """
    blocks = check_blocks(J, "J")
    if accumulate not in (None, torch.float64, torch.float32):
        raise ValueError(f"accumulate must be None, torch.float64 or torch.float32, got {accumulate!r}")
    wide = accumulate != torch.float32
    if not wide and any(x.dtype == torch.float64 for x in blocks):
        raise ValueError("accumulate must be torch.float64 for a float64 J, got torch.float32")
    if not needs_derivative(*blocks):
        return _op(blocks, wide)  # type: ignore[no-any-return]
    grams = [_Gram.apply(x, wide) for x in blocks]
    return sum(grams[1:], grams[0])


class _Gram(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(J: Tensor, wide: bool) -> Tensor:
        return _op([J], wide)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        J, _ = inputs
        ctx.dtype = output.dtype
        ctx.save_for_backward(J)
        ctx.save_for_forward(J)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        J, = ctx.saved_tensors
        dtype = J.dtype if J.dtype.itemsize > 2 else torch.float32
        return ((grad + grad.mT).to(dtype) @ J.to(dtype)).to(J.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _):
        J, = primals(ctx.saved_tensors)
        half = tangent.to(ctx.dtype) @ J.to(ctx.dtype).mT
        return half + half.mT
