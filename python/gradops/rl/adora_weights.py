"""ADORA's weights of advantages."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_floating, check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative
from ._groups import as_ids, check_column, grouping, runs
from .segment_stats import segment_stats

# rule: (a reward above this is a success, failures at least this long do not count)
RULES = {"paper_vlm": (0.5, float("inf")), "repo_vl": (0.5, 4094.0), "repo_llm": (1.01, 4054.0)}


@allow_in_graph
def adora_weights(rewards: Tensor, lengths: Tensor, *, offsets: Tensor | None = None, ids: Any = None,
                  group_size: int | None = None, rule: str = "paper_vlm", factor: float = 0.1,
                  threshold: float | None = None, max_length: float | None = None,
                  valid: Tensor | None = None) -> Tensor:
    r"""Weights of advantages: 1 in groups whose longest success is longer than their failures on average, else less.

    .. math::
        w_g = 1 \text{ if } \max_{i \in g,\ r_i > \theta} \ell_i > \mathrm{mean}_{i \in g,\ r_i \le \theta,\
        \ell_i < L}\ \ell_i, \text{ else } \lambda

    Args:
        rewards: ``(N,)``, one per response.
        lengths: ``(N,)``, the responses' lengths in tokens; integer or floating point.
        offsets, ids, group_size: the groups, one of three ways, as in :func:`group_advantages`.
        rule: ``"paper_vlm"``: the paper's length advantage (equation 5, its use for vision-language models), with
            theta = 0.5 and no limit L. ``"repo_vl"`` and ``"repo_llm"``: the two directories of the authors'
            repository, with theta 0.5 and 1.01 and L 4094 and 4054. Where a group has no success, the weight is 1
            (``"repo_llm"``: lambda); else, where it has no failure that counts, lambda (``"repo_llm"``: 1). The paper
            does not say; there ``"paper_vlm"`` does what ``"repo_vl"`` does.
        factor: lambda. The paper's rule for language models, a factor of 2 that also looks at the success rate, is in
            neither directory and not offered.
        threshold, max_length: theta and L, instead of the rule's (the authors' launch script passes L = 3900).
        valid: ``(N,)``, bool: responses that count. By default all do.

    Returns:
        ``(N,)`` weights, float32, or float64 for float64 rewards; multiply advantages by them.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or name.
        RuntimeError: a derivative is asked for.

    Source: ADORA, arXiv 2602.10019, and github.com/ShadeCloak/ADORA. O(N log N), no host sync.

    Example:
        >>> import torch
        >>> from gradops.rl import adora_weights
        >>> adora_weights(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([9, 5, 5, 9]), group_size=2)
        tensor([1.0000, 1.0000, 0.1000, 0.1000])
    """
    check_floating(rewards, "rewards")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have 1 dimension, got shape {tuple(rewards.shape)}")
    check_one_of(rule, "rule", tuple(RULES))
    refuse_derivative("adora_weights", rewards=rewards, lengths=lengths)
    offsets, first, second, size = grouping(rewards, offsets, ids, group_size)
    lengths = check_column(lengths, "lengths", rewards, None)
    theta, limit = RULES[rule]
    theta = theta if threshold is None else threshold
    limit = limit if max_length is None else max_length
    keep = torch.ones_like(rewards, dtype=torch.bool)
    if valid is not None:
        keep = check_column(valid, "valid", rewards, torch.bool)
    keys = [as_ids(rewards, offsets, first, size)] + ([second] if second is not None else [])
    order, run = runs(keys)
    numbers = torch.empty_like(run).scatter_(0, order, run)  # dense, fewer than N
    n = rewards.shape[0]
    right = segment_stats(lengths, ids=numbers, num_groups=n, valid=keep & (rewards > theta))
    wrong = segment_stats(lengths, ids=numbers, num_groups=n, valid=keep & (rewards <= theta) & (lengths < limit))
    none_right, none_wrong = right.count == 0, wrong.count == 0
    llm = rule == "repo_llm"
    long = torch.where(none_right, not llm, torch.where(none_wrong, llm, right.max > wrong.mean))
    weights = torch.where(long, 1.0, torch.full_like(right.mean, factor))
    return weights[numbers].to(torch.promote_types(rewards.dtype, torch.float32))
