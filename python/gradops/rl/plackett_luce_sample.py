"""Random rankings of the Plackett-Luce model."""
import torch
from torch import Tensor

from .._checks import check_floating


def plackett_luce_sample(scores: Tensor, k: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Draws ``k`` items one after the other, each with probability proportional to ``exp(score)`` among those left.

    By the Gumbel trick: the ``k`` largest of :math:`s_j - \log E_j`, with :math:`E_j` exponential, in falling order.

    Args:
        scores: ``(..., n)``; float64, float32, bfloat16 or float16. An item with score ``-inf`` is never drawn.
        k: how many to draw, at most ``n``; all by default.
        generator: of random numbers, on the device of ``scores``; torch's own by default.

    Returns:
        ``(..., k)``, int64, without derivative; -1 in the places for which no item was left, which
        :func:`plackett_luce_logprob` takes as the end of the ranking.

    Raises:
        TypeError: ``scores`` is no dense real floating-point tensor.
        ValueError: ``scores`` has no dimension, or ``k`` is not between 0 and ``n``.

    The distribution of ``torch.multinomial(scores.softmax(-1), k)``, of which no probability underflows here.
    Kool, van Hoof and Welling, arXiv 1903.06059. O(n) random numbers and one ``topk`` (or sort) per row.

    Example:
        >>> import torch
        >>> from gradops.rl import plackett_luce_sample
        >>> plackett_luce_sample(torch.tensor([0.0, -torch.inf, 100.0]))
        tensor([ 2,  0, -1])
    """
    check_floating(scores, "scores")
    if scores.dim() < 1:
        raise ValueError("scores must have at least 1 dimension (..., n), got none")
    n = scores.shape[-1]
    if k is None:
        k = n
    if not 0 <= k <= n:
        raise ValueError(f"k must be between 0 and the number of items, {n}, got {k}")
    noise = torch.empty_like(scores, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    # by way of uniform numbers, which torch draws much faster; a zero would take its item out
    exponential = noise.uniform_(generator=generator).clamp_(min=torch.finfo(noise.dtype).eps / 4).log_().neg_()
    keys = scores.detach() - exponential.log_()
    best, items = keys.topk(k, dim=-1)
    return torch.where(best == -torch.inf, -1, items)
