"""The named policy losses: each is a set of defaults for the same few choices. Shared by op and reference."""
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

from torch import Tensor

from .._checks import check_one_of

# In the order of the enumerations in csrc/rl/policy_loss.h.
OBJECTIVES = ("clip", "weight", "masked_weight", "gate", "logp")
LEVELS = ("token", "sequence", "geometric")
KL = (None, "k1", "k2", "k3", "k1+", "k3+")
AGGREGATES = ("token_mean", "sequence_mean", "sequence_sum", "sum")


class PolicyStats(NamedTuple):
    """What a policy loss saw: 0-dimensional float64 tensors without a gradient, means over the unmasked tokens.

    A token of zero advantage or weight is never called clipped.
    """

    clip_low: Tensor
    """Fraction of tokens whose ratio was clipped from below."""
    clip_high: Tensor
    """Fraction of tokens whose ratio was clipped from above."""
    clip_dual: Tensor
    """Fraction of tokens stopped by the dual clip."""
    ratio: Tensor
    """Mean ratio, at the level of the loss."""
    kl_k1: Tensor
    """Mean of ``old_logp - logp``: the k1 estimate of KL(old, new)."""
    kl_k3: Tensor
    """Mean of ``ratio - 1 - log(ratio)``, token by token: the k3 estimate of the same."""
    ref_kl: Tensor
    """Mean of the estimator ``kl`` against ``ref_logp``, without ``beta``; 0 without ``ref_logp``."""
    masked: Tensor
    """Fraction of all tokens that the mask leaves out."""
    tokens: Tensor
    """Number of unmasked tokens."""
    sequences: Tensor
    """Number of sequences with an unmasked token."""


@dataclass(frozen=True)
class Rule:
    """A loss with every default filled in."""

    objective: str
    aggregate: str
    clip_low: float | None = None  # None: this objective does not clip
    clip_high: float | None = None
    dual_clip: float | None = None  # None: has no such clip
    level: str = "token"
    kl: str | None = None
    beta: float = 0.0
    normalizer: float | None = None


KINDS = {
    "grpo": Rule("clip", "sequence_mean", 0.2, 0.2, inf),
    "dr_grpo": Rule("clip", "sum", 0.2, 0.2, inf),
    "bnpo": Rule("clip", "token_mean", 0.2, 0.2, inf),
    "dapo": Rule("clip", "token_mean", 0.2, 0.28, inf),
    "gspo": Rule("clip", "sequence_mean", 3e-4, 4e-4, inf, level="geometric"),
    "ppo": Rule("clip", "token_mean", 0.2, 0.2, 3.0),
    "cispo": Rule("weight", "token_mean", 1.0, 4.0),
    "minirl": Rule("masked_weight", "sum", 0.2, 0.27),
    "sapo": Rule("gate", "sequence_mean"),
    "reinforce": Rule("logp", "sequence_sum"),
}


def resolve(
    kind: str,
    *,
    level: str | None,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    weight_cap: float,
    tau: tuple[float, float],
    has_ref: bool,
    kl: str | None,
    beta: float,
    aggregate: str | None,
    normalizer: float | Tensor | None,
) -> Rule:
    """The rule that a call asks for, or an error that says what is wrong with it."""
    check_one_of(kind, "kind", tuple(KINDS))
    default = KINDS[kind]
    if level is not None:
        check_one_of(level, "level", LEVELS)
        if default.objective == "logp" and level != "token":
            raise ValueError(f"level must be 'token' for kind='{kind}', which has no ratio, got {level!r}")
    if aggregate is not None:
        check_one_of(aggregate, "aggregate", AGGREGATES)

    def choose(name: str, value: float | None, usual: float | None) -> float | None:
        if value is not None and usual is None:
            raise ValueError(f"{name} must be None for kind='{kind}', which has no such clip, got {value}")
        return usual if value is None else value

    low = choose("clip_low", clip_low, default.clip_low)
    high = choose("clip_high", clip_high, default.clip_high)
    dual = choose("dual_clip", dual_clip, default.dual_clip)
    for name, value in (("clip_low", low), ("clip_high", high), ("beta", beta)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if dual is not None and not dual > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual}")
    for name, value in (("weight_cap", weight_cap), ("tau[0]", tau[0]), ("tau[1]", tau[1])):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if kl is not None:
        check_one_of(kl, "kl", KL[1:])
    if not has_ref and (kl is not None or beta != 0):
        raise ValueError(f"ref_logp must be given for kl={kl!r}, beta={beta}")
    if normalizer is None and aggregate is None and kind == "dr_grpo":
        raise ValueError("normalizer must be given for kind='dr_grpo': a constant, such as the number of sequences "
                         "times the longest completion")
    return Rule(default.objective, aggregate or default.aggregate, low, high, dual, level or default.level,
                (kl or "k3") if has_ref else None, float(beta), _constant(normalizer))


def _constant(normalizer: float | Tensor | None) -> float | None:
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be a number or a tensor of one, got shape {tuple(normalizer.shape)}")
        return 1.0  # divided by afterwards, where it is
    if normalizer is not None and not normalizer > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}")
    return None if normalizer is None else float(normalizer)


def bounds(rule: Rule) -> tuple[float, float, float]:
    """The lowest and highest unclipped ratio, and that of the dual clip."""
    def or_inf(x: Any) -> float:
        return inf if x is None else float(x)

    return 1 - or_inf(rule.clip_low), 1 + or_inf(rule.clip_high), or_inf(rule.dual_clip)
