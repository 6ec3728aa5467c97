"""A curriculum over categories of problems, driven by the size of advantages."""
import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_ids, check_integers, check_like, check_one_of
from .._op import refuse_derivative


def curriculum_update(q: Tensor, categories: Tensor, advantages: Tensor, alpha: float,
                      unseen: str = "decay") -> Tensor:
    r"""Moves each category's value towards the mean absolute advantage of this step's samples of it.

    .. math:: Q_c \leftarrow (1 - \alpha)\, Q_c + \alpha\, \operatorname{mean}_{i:\,c_i = c} |A_i|

    Args:
        q: ``(categories,)`` floating-point values; start from zeros. Not modified.
        categories: ``(samples,)`` int32 or int64 in ``[0, len(q))``.
        advantages: ``(samples,)`` floating-point: one number per sample. Where the tokens of a sample differ, pass its
            mean of ``|A|`` over response tokens.
        alpha: step size in [0, 1]. The authors' scripts use 0.5.
        unseen: a category without samples this step "decay"s, as if its mean were 0, or "keep"s its value.

    Returns:
        A new tensor like ``q``. Means are made in float64, in an order that does not vary: the same bits every time.

    Raises:
        TypeError: a tensor has a wrong dtype or layout.
        ValueError: shapes or devices disagree, ``alpha`` is outside [0, 1], ``unseen`` is another word, or, on the CPU,
            a category is outside ``[0, len(q))``; on CUDA such a sample counts nowhere.
        RuntimeError: an input asks for a derivative: the curriculum is a constant of the loss.

    SEC, arXiv 2505.14970. "decay" is what the authors' code does; their text can be read as "keep".
    O(categories * samples), in torch.

    Example:
        >>> import torch
        >>> from gradops.rl import curriculum_update
        >>> curriculum_update(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), torch.tensor([1.0, -3.0]), 0.5)
        tensor([1.0000, 0.5000])
    """
    check_floating(q, "q")
    check_integers(categories, "categories")
    check_floating(advantages, "advantages")
    refuse_derivative("curriculum_update", q=q, advantages=advantages)
    if q.dim() != 1 or q.shape[0] == 0:
        raise ValueError(f"q must have shape (categories,), got {tuple(q.shape)}")
    if categories.dim() != 1:
        raise ValueError(f"categories must have shape (samples,), got {tuple(categories.shape)}")
    check_like(advantages, "advantages", categories, "categories")
    check_device(categories, "categories", q, "q")
    check_one_of(unseen, "unseen", ("decay", "keep"))
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    check_ids(categories, "categories", q.shape[0])
    # A table of categories x samples: sums along its rows have a fixed order, which index_add on CUDA has not.
    mine = torch.arange(q.shape[0], device=q.device)[:, None] == categories
    count = mine.sum(1)
    mean = torch.where(mine, advantages.double().abs(), 0).sum(1) / count.clamp(min=1)
    moved = ((1 - alpha) * q.double() + alpha * mean).to(q.dtype)
    return moved if unseen == "decay" else torch.where(count > 0, moved, q)


def curriculum_probs(q: Tensor, tau: float) -> Tensor:
    r"""The probabilities with which categories are drawn.

    .. math:: p_c \propto \exp(Q_c / \tau)

    Args:
        q: ``(categories,)`` floating-point values.
        tau: temperature above 0. The authors' scripts use 1.0, 0.4 and 0.2.

    Returns:
        A tensor like ``q`` with sum 1; the largest exponent is subtracted first, so no value of ``q`` overflows.

    Raises:
        TypeError: ``q`` is no dense real floating-point tensor.
        ValueError: ``q`` is not 1-dimensional, or ``tau`` is not above 0.

    SEC, arXiv 2505.14970; categories are drawn independently for each prompt, with replacement. Differentiable.

    Example:
        >>> import torch
        >>> from gradops.rl import curriculum_probs
        >>> curriculum_probs(torch.tensor([0.0, 0.0]), 0.4)
        tensor([0.5000, 0.5000])
    """
    check_floating(q, "q")
    if q.dim() != 1:
        raise ValueError(f"q must have shape (categories,), got {tuple(q.shape)}")
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    return torch.softmax(q / tau, 0)
