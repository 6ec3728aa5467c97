"""Which responses of each group to train on."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_floating
from .._compiler import allow_in_graph
from .._op import refuse_derivative
from ._groups import as_ids, check_column, check_labels, counts, grouping, runs


@allow_in_graph
def group_top_k_mask(rewards: Tensor, k: int, *, offsets: Tensor | None = None, ids: Any = None,
                     group_size: int | None = None, valid: Tensor | None = None, duplicates: Tensor | None = None,
                     alpha: float = 1.0) -> Tensor:
    r"""Marks the ``k`` best responses of every group.

    With ``duplicates``, a response that its group holds :math:`m_i` copies of competes with
    :math:`r_i - \alpha \log m_i`.

    Args:
        rewards: ``(N,)``, one per response; the final ones also where training starts from an intermediate state.
        k: how many to accept in a group; all of a group that has fewer. 1 is best-of-N.
        offsets, ids, group_size: the groups, one of three ways, as in :func:`group_advantages`.
        valid: ``(N,)``, bool: responses that may be accepted. By default all. A NaN reward never is.
        duplicates: ``(N,)`` integer labels, equal for equal responses; counted inside a group, among valid ones.
        alpha: the temperature of the target ``p(x) exp(r / alpha)``, in the units of the rewards.

    Returns:
        ``(N,)``, bool. Of equal rewards the earlier one is taken.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape.
        RuntimeError: a derivative is asked for.

    GRAFT accepts the best of a group and fine-tunes on them; P-GRAFT (arXiv 2510.02692) accepts by the final reward
    and fine-tunes on an intermediate state. That copies are corrected for by ``log m`` is the paper's; that it counts
    in units of ``alpha`` is ours, so that ``exp(r / alpha)`` is divided by ``m``. O(N log N), no host sync.

    Example:
        >>> import torch
        >>> from gradops.rl import group_top_k_mask
        >>> group_top_k_mask(torch.tensor([0.1, 0.9, 0.5, 0.2]), 1, group_size=2)
        tensor([False,  True,  True, False])
    """
    check_floating(rewards, "rewards")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have 1 dimension, got shape {tuple(rewards.shape)}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}")
    if not alpha >= 0:
        raise ValueError(f"alpha must not be negative, got {alpha}")
    refuse_derivative("group_top_k_mask", rewards=rewards)
    offsets, first, second, size = grouping(rewards, offsets, ids, group_size)
    keys = [as_ids(rewards, offsets, first, size)] + ([second] if second is not None else [])
    score = rewards.double()
    usable = ~score.isnan()
    may = usable
    if valid is not None:
        valid = check_column(valid, "valid", rewards, torch.bool)
        may = usable & valid
    if duplicates is not None:
        labels = check_labels(duplicates, "duplicates", rewards)
        among = [] if valid is None else [valid.long()]
        copies = counts([*keys, labels, *among])
        score = score - alpha * copies.double().log()
    by_score = torch.sort(torch.where(may, -score, torch.inf), stable=True).indices
    by_score = by_score[torch.sort((~may[by_score]).long(), stable=True).indices]  # after those with reward -inf
    order, run = runs([key[by_score] for key in keys])
    place = torch.arange(len(run), device=run.device)
    first_of = torch.full_like(run, len(run)).scatter_reduce_(0, run, place, "amin")
    chosen = place - first_of[run] < k
    return torch.zeros_like(may).scatter_(0, by_score[order], chosen) & may
