"""The log-likelihood of rankings under the Plackett-Luce model."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_integers
from .._compiler import allow_in_graph
from .._op import KeepsInputs, needs_derivative, primals, register
from .reference.selection import left_over

_op = register("plackett_luce_logprob", fake=lambda scores, permutation: scores.new_empty(scores.shape[:-1]))
_gradient = register("plackett_luce_gradient", fake=lambda scores, permutation: torch.empty_like(
    scores, memory_format=torch.contiguous_format))


@allow_in_graph
def plackett_luce_logprob(scores: Tensor, permutation: Tensor) -> Tensor:
    r"""Log-probability that items are drawn, without replacement, in the given order.

    .. math:: \log p(z) = \sum_{i=1}^{k} \Big[ s_{z_i} - \log \sum_{j \notin \{z_1, \dots, z_{i-1}\}} e^{s_j} \Big]

    With ``k < n`` this is the probability of the first ``k`` places, whatever comes after.

    Args:
        scores: ``(..., n)``; float64, float32, bfloat16 or float16. A score of ``-inf`` takes the item out; a ranking
            that has it all the same has log-probability ``-inf``.
        permutation: ``(..., k)``, int32 or int64, the ranked items from first to last, without repetition; its leading
            dimensions and those of ``scores`` are broadcast. The first negative entry ends a ranking, so that rankings
            of different lengths fit into one tensor.

    Returns:
        ``(...)``; float64 for float64 scores, else float32. Computed from differences of scores, so that large scores
        cost no digits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a dimension is missing, the leading dimensions cannot be broadcast, devices differ; or (CPU only)
            ``permutation`` has an item twice or one that is not below ``n``. On CUDA an item out of range gives NaN for
            that ranking, a repeated one a wrong number.

    Plackett 1975, Luce 1959; for selectors trained by DRO (arXiv 2505.03075), whose own code generates the ranking as
    text instead. O(n) per row, forward and gradient; differentiable in ``scores`` to any order, where the second takes
    O(n k) memory.

    Example:
        >>> import torch
        >>> from gradops.rl import plackett_luce_logprob
        >>> scores = torch.tensor([1.0, 2.0, 3.0]).log()
        >>> plackett_luce_logprob(scores, torch.tensor([2, 0])).exp()  # 3/6 * 1/3
        tensor(0.1667)
    """
    check_floating(scores, "scores")
    check_integers(permutation, "permutation")
    for name, x, shape in (("scores", scores, "(..., n)"), ("permutation", permutation, "(..., k)")):
        if x.dim() < 1:
            raise ValueError(f"{name} must have at least 1 dimension {shape}, got none")
    check_device(permutation, "permutation", scores, "scores")
    if scores.shape[:-1] != permutation.shape[:-1]:
        try:
            batch = torch.broadcast_shapes(scores.shape[:-1], permutation.shape[:-1])
        except RuntimeError:
            raise ValueError(f"the leading dimensions of scores {tuple(scores.shape)} and permutation "
                             f"{tuple(permutation.shape)} cannot be broadcast") from None
        scores = scores.expand(*batch, scores.shape[-1])
        permutation = permutation.expand(*batch, permutation.shape[-1])
    scores = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    permutation = permutation.long()
    return (_LogProb.apply if needs_derivative(scores) else _op)(scores, permutation)


def _hessian_product(scores: Tensor, permutation: Tensor, v: Tensor) -> Tensor:
    """The Hessian of the log-probability times v, in differentiable torch. It is symmetric."""
    left, ranked = left_over(permutation, scores.shape[-1])
    p = scores[..., None, :].masked_fill(~left, -torch.inf).softmax(-1) * ranked[..., None]
    v = v[..., None, :]
    return (p * ((p * v).sum(-1, keepdim=True) - v)).sum(-2)


class _LogProb(KeepsInputs):
    @staticmethod
    def forward(scores: Tensor, permutation: Tensor) -> Tensor:
        return _op(scores, permutation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        scores, permutation = ctx.saved_tensors
        return grad[..., None] * _Gradient.apply(scores, permutation), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _):
        scores, permutation = primals(ctx.saved_tensors)
        return (_Gradient.apply(scores, permutation) * tangent).sum(-1)


class _Gradient(KeepsInputs):
    """The gradient of the log-probability of each row."""

    @staticmethod
    def forward(scores: Tensor, permutation: Tensor) -> Tensor:
        return _gradient(scores, permutation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        scores, permutation = ctx.saved_tensors
        return _hessian_product(scores, permutation, grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _):
        scores, permutation = primals(ctx.saved_tensors)
        return _hessian_product(scores, permutation, tangent)
