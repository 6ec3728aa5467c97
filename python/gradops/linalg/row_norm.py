"""Row normalisation, plain or between two centrings."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_matrix
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, primals, register

_op = register("row_norm", fake=lambda x, eps, center: torch.empty_like(x, memory_format=torch.contiguous_format))


@allow_in_graph
def row_norm(x: Tensor, *, eps: float = 1e-8, center: bool = False) -> Tensor:
    r"""Divides each row by its Euclidean norm.

    .. math:: y_i = \frac{x_i}{\|x_i\|_2 + \epsilon}

    With ``center=True`` the mean over the rows, :math:`\Pi_\perp x = x - \mathbf{1}\bar{x}^\top`, is subtracted
    before and again after. Sums are made in float64; a zero row stays zero.

    Args:
        x: ``(..., m, n)``; rows are along the last dimension; float64, float32, bfloat16 or float16. Not modified.
        eps: added to the norm, in the units of ``x``.
        center: project out the mean row (dimension -2) before and after.

    Returns:
        A new tensor like ``x``.

    Raises:
        TypeError: ``x`` is no dense real floating-point tensor.
        ValueError: ``x`` has fewer than 2 dimensions, or ``eps`` is negative.

    The row-norm and centred row-norm updates of Lau and Su, arXiv 2605.18106 (their code: ``inverse_eps``).
    Reads ``x`` once, or three times with ``center=True``, and writes once. Differentiable to any order.

    Example:
        >>> import torch
        >>> from gradops.linalg import row_norm
        >>> row_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), eps=0.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
    """
    check_matrix(x, "x")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if needs_derivative(x):
        return _RowNorm.apply(x, eps, center)
    return _op(x, eps, center)


def _derivative(x: Tensor, v: Tensor, eps: float, center: bool) -> Tensor:
    """The Jacobian times v, in differentiable torch. It is symmetric, so this is vjp and jvp."""
    if center:
        x, v = x - x.mean(-2, keepdim=True), v - v.mean(-2, keepdim=True)
    squares = (x * x).sum(-1, keepdim=True)
    zero = squares == 0
    norm = torch.where(zero, 1, squares).sqrt()
    out = (v - x * ((x * v).sum(-1, keepdim=True) / (norm * (norm + eps)))) / (norm + eps)
    out = torch.where(zero, v / eps if eps else 0, out)  # at a zero row y = x / eps
    return out - out.mean(-2, keepdim=True) if center else out


class _RowNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float, center: bool) -> Tensor:
        return _op(x, eps, center)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        x, ctx.eps, ctx.center = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, = ctx.saved_tensors
        return _derivative(x, grad, ctx.eps, ctx.center), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_):
        x, = primals(ctx.saved_tensors)
        return _derivative(x, tangent, ctx.eps, ctx.center)
