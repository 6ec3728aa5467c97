"""Rewards to advantages: centred by a baseline of their group, divided by a spread."""
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._checks import check_floating, check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register
from ._groups import as_ids, check_column, check_labels, check_offsets, counts, grouping
from .adora_weights import adora_weights
from .presets import PRESETS, settle

# The order is that of the enumerations in csrc/rl/group_rules.h.
BASELINES = ("mean", "loo", "opo", "max2", "none")
SCALES = ("group", "batch", "loo", "mean", "none")
EPS_MODES = ("add", "max", "var")
SINGLETONS = ("zero", "keep", "group")


def _fake(rewards, *_):
    out = torch.promote_types(rewards.dtype, torch.float32)
    return rewards.new_empty(rewards.shape, dtype=out), rewards.new_empty(rewards.shape, dtype=torch.bool)


_op = register("group_advantages", fake=_fake, vmap=False)


@lru_cache(maxsize=1024)
def _rule(baseline: str | None, scale: str | None, correction: float | None, eps: float | None, eps_mode: str | None,
          singleton: str | None, degenerate: str | None, preset: str | None, compat: str | None, strata: bool,
          ) -> tuple[list[int], float, float]:
    """(the choices, correction, eps) as the op takes them."""
    given = {"baseline": baseline, "scale": scale, "correction": correction, "eps": eps, "eps_mode": eps_mode,
                 "singleton": singleton, "degenerate": degenerate}
    s = settle(given, preset, compat)
    check_one_of(s["baseline"], "baseline", BASELINES)
    check_one_of(s["scale"], "scale", SCALES)
    check_one_of(s["eps_mode"], "eps_mode", EPS_MODES)
    check_one_of(s["singleton"], "singleton", SINGLETONS if strata else SINGLETONS[:2])
    check_one_of(s["degenerate"], "degenerate", ("zero", "keep"))
    for name in ("correction", "eps"):
        if not s[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {s[name]}")
    if s["scale"] == "loo" and s["baseline"] == "max2":
        raise ValueError("scale must not be 'loo' with baseline 'max2'")
    if compat == "trl" and s["scale"] not in ("group", "batch", "none"):
        raise ValueError(f"scale must be 'group', 'batch' or 'none' with compat='trl', got {s['scale']!r}")
    choices = [BASELINES.index(s["baseline"]), SCALES.index(s["scale"]), EPS_MODES.index(s["eps_mode"]),
               SINGLETONS.index(s["singleton"]), int(s["degenerate"] == "keep"), int(compat == "trl"), int(strata)]
    return choices, float(s["correction"]), float(s["eps"])


@allow_in_graph
def group_advantages(rewards: Tensor, *, offsets: Tensor | None = None, ids: Any = None, group_size: int | None = None,
                     baseline: str | None = None, scale: str | None = None, correction: float | None = None,
                     eps: float | None = None, eps_mode: str | None = None, singleton: str | None = None,
                     degenerate: str | None = None, valid: Tensor | None = None, weights: Tensor | None = None,
                     strata: Tensor | None = None, alpha: float = 1.0, lengths: Tensor | None = None,
                     preset: str | None = None, compat: str | None = None) -> tuple[Tensor, Tensor]:
    r"""Subtracts a baseline of its group from every reward and divides by a spread.

    .. math::
        A_i = \frac{r_i - b_g}{\sigma_g + \epsilon}, \qquad
        b_g = \frac{1}{n} \sum_{j \in g} r_j, \quad \sigma_g^2 = \frac{1}{n - c} \sum_{j \in g} (r_j - b_g)^2

    Args:
        rewards: ``(N,)``, one per response; float64, float32, bfloat16 or float16. With ``preset="gdpo"`` also
            ``(N, K)``, one column per reward function.
        offsets: ``(G + 1,)``: group ``g`` is ``rewards[offsets[g]:offsets[g + 1]]``. On CPU checked to run from 0 to
            ``N``; on CUDA trusted, but never read beyond ``N``; rewards outside all groups get 0.
        ids: instead, ``(N,)`` labels: any int64 values in any order; or a pair of them, such as (prompt, turn): a
            group is then one pair.
        group_size: instead, the size of every group, one after another.
        baseline: ``"mean"`` (the default); ``"loo"``, the mean of the others; ``"opo"``, the mean weighted by
            ``lengths``; ``"max2"``, by which only the largest reward gets what it is above the second, the others 0;
            ``"none"``.
        scale: ``"group"`` (the default), the group's standard deviation; ``"batch"``, that of all valid rewards;
            ``"loo"``, that of the others (1 where there is only one other, and no division where it is exactly 0);
            ``"mean"``, the group's mean; ``"none"``.
        correction: c, 1 by default (Bessel); 0 is the population's.
        eps: 1e-6 by default, in the units of the rewards (squared with ``eps_mode="var"``).
        eps_mode: ``"add"`` (the default), ``sigma + eps``; ``"max"``, ``max(sigma, eps)``; ``"var"``,
            ``sqrt(sigma^2 + eps)``.
        singleton: for a group with one valid reward: ``"zero"`` (the default); ``"keep"``, as if its mean were 0 and
            its standard deviation 1; with strata also ``"group"``, what it gets in the group without strata.
        degenerate: for a group of equal rewards: ``"zero"`` (the default), or ``"keep"``, the formula (which is 0 too
            unless ``baseline="none"``).
        valid: ``(N,)``, bool; False for rewards that neither count nor get an advantage (they get 0), whatever they
            are, NaN included. By default all are valid.
        weights: ``(N,)``: how often each reward counts in means and deviations; one that is not positive makes the
            reward invalid. With ``preset="gdpo"``: ``(K,)``, what each column's advantages are multiplied by.
        strata: ``(N,)`` labels inside the groups: ``A = alpha * A_inside_stratum + (1 - alpha) * A_in_group``.
        alpha: see there.
        lengths: ``(N,)``, the responses' lengths, for ``"opo"``, ``"adora"``, and ``"gdpo"`` with ``compat="verl"``.
        preset: fixes what a method is defined by; explicit arguments may set the rest, and must not contradict.
            ``"grpo"`` mean, group. ``"dr_grpo"`` mean, none. ``"rloo"`` loo, none. ``"trloo"`` the same with
            singletons kept, for returns (see :func:`discounted_returns`) keyed by (prompt, turn). ``"san"`` grpo with
            strata, correction 0 by default. ``"gdpo"`` grpo column by column, summed, then normalised over the batch.
            ``"opo"`` opo, none. ``"grpo_passk"`` max2. ``"maxrl"`` mean, mean. ``"lite_ppo"`` mean, batch.
            ``"adora"`` grpo times :func:`adora_weights`.
        compat: ``"trl"`` (eps 1e-4; NaN rewards are not valid), ``"verl"`` (eps 1e-6, singletons kept) or
            ``"openrlhf"`` (eps 1e-9): that library's conventions, without its rounding: equal rewards are exactly 0.

    Returns:
        ``(advantages, is_degenerate)``, shape ``(N,)``: float32, or float64 for float64 rewards, also for 16-bit
        rewards, whose precision would be too low; and bool, whether the valid rewards of the member's group (of all
        its columns) are equal or fewer than two, so that it says nothing.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or name, or contradicts preset or compat; offsets
            do not rise from 0 to N (CPU).
        RuntimeError: a derivative is asked for: advantages are constants of the loss.

    A NaN among a group's valid rewards makes that group NaN, and no other (with a batch-wide spread: all).
    Sums are made in float64 of terms rounded so that no bit depends on their order: permuted rewards give exactly the
    permuted advantages, for any thread count and batch composition. Error against exact arithmetic: the rounding of
    the result, for means up to 1e5 standard deviations and beyond. Equal rewards give exactly 0, decided by min = max.
    Linear in ``N`` on CPU; one launch on CUDA (two and torch's elementwise ones for ``"gdpo"``, and torch's sorts
    for ``"adora"``), without waiting for the device.

    Sources: grpo arXiv 2402.03300, dr_grpo 2503.20783, rloo 2402.14740, gdpo 2601.05242, opo 2505.23585, grpo_passk
    2503.19595 (divided by the deviation as in verl; ``scale="none"`` is the paper's), lite_ppo 2508.08221, adora
    2602.10019, san 2510.06214, whose kind of deviation, eps, alpha and rule for singletons we could not confirm:
    those defaults are ours. maxrl is that of SkyRL. trloo is that of Dr. Kernel: ``n / (n - 1) (G - mean)``.

    Example:
        >>> import torch
        >>> from gradops.rl import group_advantages
        >>> rewards = torch.tensor([1.0, 0.1, 0.0, 0.1])
        >>> group_advantages(rewards, ids=torch.tensor([5, -9, 5, -9]))
        (tensor([ 0.7071,  0.0000, -0.7071,  0.0000]), tensor([False,  True, False,  True]))
        >>> group_advantages(rewards, group_size=4, preset="dr_grpo")[0]
        tensor([ 0.7000, -0.2000, -0.3000, -0.2000])
    """
    check_floating(rewards, "rewards")
    refuse_derivative("group_advantages", rewards=rewards, weights=weights, lengths=lengths)
    if rewards.dim() != 1 and not (preset == "gdpo" and rewards.dim() == 2):
        raise ValueError(f"rewards must have 1 dimension (or 2 with preset='gdpo'), got shape {tuple(rewards.shape)}")
    rule, correction, eps = _rule(baseline, scale, correction, eps, eps_mode, singleton, degenerate, preset, compat,
                                  strata is not None)
    offsets, first, second, size = grouping(rewards, offsets, ids, group_size)
    if valid is not None:
        valid = check_column(valid, "valid", rewards, torch.bool)
    if lengths is not None:
        lengths = check_column(lengths, "lengths", rewards, None)
    elif rule[0] == 2 or (preset is not None and "lengths" in PRESETS[preset].needs):
        raise ValueError(f"lengths must be given with {'baseline=' + repr(BASELINES[2]) if rule[0] == 2 else preset}")
    if strata is not None:
        if second is not None:
            raise ValueError("strata must not be given with a pair of ids")
        first, offsets = as_ids(rewards, offsets, first, size), None
        second = check_labels(strata, "strata", rewards)
    elif preset == "san":
        raise ValueError("strata must be given with preset='san'")
    if preset == "gdpo":
        return _gdpo(rewards, offsets, first, second, valid, weights, lengths, size, rule, correction, eps, compat)
    if weights is not None:
        weights = check_column(weights, "weights", rewards, None)
    out, same = _op(rewards, offsets, first, second, valid, weights, lengths, size, rule, correction, eps, float(alpha))
    if preset == "adora":
        assert lengths is not None
        out = out * adora_weights(rewards, lengths, offsets=offsets, group_size=size if first is offsets else None,
                                  ids=first if second is None else (first, second), valid=valid).to(out.dtype)
    return out, same


def _gdpo(rewards: Tensor, offsets: Tensor | None, first: Tensor | None, second: Tensor | None, valid: Tensor | None,
          weights: Tensor | None, lengths: Tensor | None, size: int, rule: list[int], correction: float, eps: float,
          compat: str | None) -> tuple[Tensor, Tensor]:
    """Columns normalised in their groups, summed, and the sum normalised over the batch: in compat="trl" as in its
    normalize_then_sum, in compat="verl" over tokens as its masked_whiten does."""
    columns = rewards[:, None] if rewards.dim() == 1 else rewards
    parts, same = _op(columns.T, offsets, first, second, valid, None, None, size, rule, correction, eps, 1.0)
    if weights is None:
        total = parts.sum(0)
    elif isinstance(weights, Tensor) and weights.shape == columns.shape[1:]:
        total = (weights.to(parts.dtype)[:, None] * parts).sum(0)
    else:
        raise ValueError(f"weights must be a tensor with one entry per column, shape ({columns.shape[1]},), got "
                         f"{tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__}")
    rule = [0, 0, rule[2], 0, 0, 0, 0]
    counted = None
    if compat == "trl":
        scored = ~columns.isnan().all(1)
        valid = scored if valid is None else scored & valid
    if compat == "verl":
        if lengths is None:
            raise ValueError("lengths must be given with preset='gdpo' and compat='verl', which whitens over tokens")
        rule, eps, counted = [0, 0, EPS_MODES.index("var"), 0, 0, 0, 0], 1e-8, lengths
    out, _ = _op(total, None, None, None, valid, counted, None, max(total.shape[0], 1), rule, correction, eps, 1.0)
    return out, same.all(0)


@allow_in_graph
def trajectory_advantages(rewards: Tensor, trajectory_ids: Tensor, segment_offsets: Tensor, *, eps: float = 1e-6,
                          singleton: str = "keep") -> Tensor:
    r"""Normalises rewards over trajectories and hands every segment the advantage of its trajectory.

    .. math::
        A_s = \frac{R_{\tau(s)} - \mathrm{mean}_\tau R_\tau}{\mathrm{std}_\tau R_\tau + \epsilon}

    where a prompt's trajectory :math:`\tau` counts once, however many segments it was cut into, and whether or not
    some were drawn twice. (A group over segments would weigh long trajectories more.)

    Args:
        rewards: ``(S,)``, for every segment the reward of its trajectory (the same for all segments of one).
        trajectory_ids: ``(S,)`` labels, int64 or int32: the trajectory a segment is of; any values, told apart inside
            a prompt.
        segment_offsets: ``(P + 1,)``: prompt ``p`` has the segments ``segment_offsets[p]:segment_offsets[p + 1]``.
        eps: added to the standard deviation, which has Bessel's correction.
        singleton: of a prompt with one trajectory: ``"keep"``, ``R / (1 + eps)``, as the authors' code; ``"zero"``.

    Returns:
        ``(S,)`` advantages: float32, or float64 for float64 rewards.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or name; segment_offsets do not rise from 0 to S
            (CPU).
        RuntimeError: a derivative is asked for.

    Source: DCPO of MemAct, arXiv 2510.12635, and its code. O(S log S); no host sync.

    Example:
        >>> import torch
        >>> from gradops.rl import trajectory_advantages
        >>> trajectory_advantages(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1]),
        ...                       torch.tensor([0, 4]))
        tensor([ 0.7071,  0.7071,  0.7071, -0.7071])
    """
    check_floating(rewards, "rewards")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have 1 dimension, got shape {tuple(rewards.shape)}")
    refuse_derivative("trajectory_advantages", rewards=rewards)
    rule, _, eps = _rule("mean", "group", None, eps, None, singleton, None, None, None, False)
    trajectories = check_labels(trajectory_ids, "trajectory_ids", rewards)
    offsets = check_offsets(segment_offsets, rewards, "segment_offsets")
    prompts = as_ids(rewards, offsets, None, 1)
    weights = counts([prompts, trajectories]).double().reciprocal()  # a trajectory's segments weigh 1 together
    return _op(rewards, offsets, None, None, None, weights, None, 1, rule, 1.0, eps, 1.0)[0]
