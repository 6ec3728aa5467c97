"""What the names of `group_advantages` stand for. `fixed` may not be contradicted; `default` may be overridden."""
from dataclasses import dataclass, field
from typing import Any

DEFAULTS: dict[str, Any] = {
    "baseline": "mean", "scale": "group", "correction": 1, "eps": 1e-6, "eps_mode": "add", "singleton": "zero",
    "degenerate": "zero",
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    fixed: dict[str, Any]
    default: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


PRESETS = {
    "grpo": Preset({"baseline": "mean", "scale": "group"}),  # arXiv 2402.03300
    "dr_grpo": Preset({"baseline": "mean", "scale": "none"}),  # 2503.20783
    "rloo": Preset({"baseline": "loo", "scale": "none"}),  # 2402.14740
    "trloo": Preset({"baseline": "loo", "scale": "none", "singleton": "keep"}),  # Dr. Kernel
    "san": Preset({"baseline": "mean", "scale": "group"}, {"correction": 0}, ("strata",)),  # 2510.06214
    "gdpo": Preset({"baseline": "mean", "scale": "group"}),  # 2601.05242
    "opo": Preset({"baseline": "opo", "scale": "none"}, needs=("lengths",)),  # 2505.23585
    "grpo_passk": Preset({"baseline": "max2"}),  # 2503.19595
    "maxrl": Preset({"baseline": "mean", "scale": "mean"}),
    "lite_ppo": Preset({"baseline": "mean", "scale": "batch"}),  # 2508.08221
    "adora": Preset({"baseline": "mean", "scale": "group"}, needs=("lengths",)),  # 2602.10019
}

_TRL = {"correction": 1, "eps": 1e-4, "eps_mode": "add", "singleton": "zero", "degenerate": "zero"}
_VERL = {"correction": 1, "eps": 1e-6, "eps_mode": "add", "singleton": "keep", "degenerate": "zero"}
_OPENRLHF = {"correction": 1, "eps": 1e-9, "eps_mode": "add", "singleton": "zero", "degenerate": "zero"}
# The conventions of a library, and the presets that it has an estimator for. TRL: GRPOTrainer and RLOOTrainer of 1.16,
# where a NaN reward is one that could not be scored. verl 0.9: core_algos. OpenRLHF: experience_maker.
COMPAT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "trl": (_TRL, ("grpo", "dr_grpo", "rloo", "gdpo", "lite_ppo")),
    "verl": (_VERL, ("grpo", "dr_grpo", "rloo", "opo", "grpo_passk", "gdpo")),
    "openrlhf": (_OPENRLHF, ("grpo", "dr_grpo", "rloo")),
}


def settle(given: dict[str, Any], preset: str | None, compat: str | None) -> dict[str, Any]:
    """DEFAULTS, overridden by the preset, the library's conventions and what the caller gave (not None)."""
    out = dict(DEFAULTS)
    fixed: dict[str, tuple[Any, str]] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {preset!r}")
        out |= PRESETS[preset].default
        fixed |= {k: (v, f"preset={preset!r}") for k, v in PRESETS[preset].fixed.items()}
    if compat is not None:
        if compat not in COMPAT:
            raise ValueError(f"compat must be one of {', '.join(map(repr, COMPAT))}, got {compat!r}")
        conventions, presets = COMPAT[compat]
        if preset is not None and preset not in presets:
            raise ValueError(f"preset must be one of {', '.join(map(repr, presets))} with compat={compat!r}, "
                             f"got {preset!r}")
        fixed |= {k: (v, f"compat={compat!r}") for k, v in conventions.items()}
    out |= {k: v for k, (v, _) in fixed.items()}
    for name, value in given.items():
        if value is None:
            continue
        if name in fixed and fixed[name][0] != value:
            raise ValueError(f"{name} must be {fixed[name][0]!r} with {fixed[name][1]}, got {value!r}")
        out[name] = value
    return out
