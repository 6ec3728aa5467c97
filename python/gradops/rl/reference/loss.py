"""Policy losses and off-policy corrections."""
import math
from typing import Any

import torch
from torch import Tensor

from .._policy_kinds import PolicyStats, Rule, bounds, resolve


def _sequence_of(logp: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """For each token of flattened logp the number of its sequence; how many sequences there are."""
    if cu_seqlens is None:
        rows, length = logp.shape
        return torch.arange(rows, device=logp.device).repeat_interleave(length), rows
    lengths = cu_seqlens.diff().long()
    return torch.arange(len(lengths), device=logp.device).repeat_interleave(lengths), len(lengths)


def policy_loss(
    logp: Tensor, old_logp: Tensor | None, advantages: Tensor, *, cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None, kind: str = "grpo", level: str | None = None, clip_low: float | None = None,
    clip_high: float | None = None, dual_clip: float | None = None, weight_cap: float = 5.0,
    tau: tuple[float, float] = (1.0, 1.05), ref_logp: Tensor | None = None, kl: str | None = None, beta: float = 0.0,
    is_weights: Tensor | None = None, aggregate: str | None = None, normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:  # fmt: skip
    rule = resolve(kind, level=level, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
                   weight_cap=weight_cap, tau=tau, has_ref=ref_logp is not None, kl=kl, beta=beta,
                   aggregate=aggregate, normalizer=normalizer)  # fmt: skip
    dtype = torch.promote_types(logp.dtype, torch.float32)
    sequence, sequences = _sequence_of(logp, cu_seqlens)
    shape = logp.shape
    keep = torch.ones_like(sequence, dtype=torch.bool) if mask is None else mask.bool().flatten()

    def tokens(x: Tensor, other: float = 0.0) -> Tensor:
        """One number per token; other where masked."""
        x = x.to(dtype)
        x = x.flatten() if x.shape == shape else x[sequence]
        return torch.where(keep, x, other)

    def total(x: Tensor) -> Tensor:
        return torch.zeros(sequences, dtype=x.dtype, device=x.device).index_add(0, sequence, x)

    lp, advantage = tokens(logp), tokens(advantages)
    log_ratio = lp - (lp.detach() if old_logp is None else tokens(old_logp))
    weight = torch.ones_like(lp) if is_weights is None else tokens(is_weights)
    counts = total(keep.to(dtype))
    own_ratio = log_ratio
    if rule.level != "token":
        log_ratio = total(log_ratio)
        log_ratio = (log_ratio / counts.clamp_min(1) if rule.level == "geometric" else log_ratio)[sequence]
    biggest = torch.finfo(dtype).max
    ratio = log_ratio.exp().clamp(max=biggest)
    loss, codes = _objective(rule, ratio, lp.clamp(min=-biggest), advantage, weight, weight_cap, tau)
    loss = torch.where(keep, loss, 0)
    ref_kl = torch.zeros_like(loss)
    if ref_logp is not None:
        ref_kl = torch.where(keep, _kl(lp, tokens(ref_logp), rule.kl), 0)
        loss = loss + rule.beta * ref_kl
    if rule.aggregate == "sequence_mean":
        loss = loss / counts.clamp_min(1)[sequence]
    n, nonempty = counts.sum(), (counts > 0).sum()
    divisor: Any = {"token_mean": n, "sequence_mean": nonempty, "sequence_sum": nonempty, "sum": 1}[rule.aggregate]
    divisor = max(divisor, 1) if rule.normalizer is None else rule.normalizer
    value = loss.sum() / divisor
    if isinstance(normalizer, Tensor):
        value = value / normalizer.to(value.dtype).reshape(())

    def mean(x: Tensor) -> Tensor:
        return (torch.where(keep, x, 0).detach().double().sum() / n.clamp_min(1)).double()

    low, high, dual = (mean((codes == code).double()) for code in (1, 2, 3))
    stats = PolicyStats(
        clip_low=low, clip_high=high, clip_dual=dual,
        ratio=mean(ratio), kl_k1=mean(-own_ratio), kl_k3=mean(own_ratio.expm1() - own_ratio), ref_kl=mean(ref_kl),
        masked=(~keep).double().sum() / max(keep.numel(), 1), tokens=n.double(),
        sequences=nonempty.double(),
    )  # fmt: skip
    return value, stats


def _objective(rule: Rule, r: Tensor, logp: Tensor, a: Tensor, w: Tensor, cap: float,
               tau: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The loss of each token; 1, 2 or 3 where it was clipped from below, above, or by the dual clip."""
    low, high, dual = bounds(rule)
    none = torch.zeros_like(a, dtype=torch.int64)
    if rule.objective == "clip":
        a = a * w
        clipped = -torch.minimum(r * a, r.clamp(low, high) * a)
        clipped = torch.where(a < 0, torch.minimum(clipped, -a * dual if dual < math.inf else clipped), clipped)
        code = (none + ((a < 0) & (r < low)) + 2 * ((a > 0) & (r > high)) + 3 * ((a < 0) & (r > dual)))
        return clipped, code
    if rule.objective == "weight":
        a = a * w
        return -r.clamp(low, high).detach() * a * logp, none + ((a != 0) & (r < low)) + 2 * ((a != 0) & (r > high))
    if rule.objective == "masked_weight":
        code = none + ((a < 0) & (r < low)) + 2 * ((a > 0) & (r > high))
        return torch.where(code == 0, -(r * w).clamp(max=cap).detach() * a * logp, 0), code
    if rule.objective == "gate":
        t = torch.full_like(a, tau[1]).masked_fill(a > 0, tau[0])
        return -a * w * 4 / t * torch.sigmoid(t * (r - 1)), none
    return -a * w * logp, none


def _kl(logp: Tensor, ref: Tensor, kl: str | None) -> Tensor:
    u = ref - logp
    value = {"k1": -u, "k2": u * u / 2, "k3": u.expm1() - u}[str(kl).rstrip("+")]
    if str(kl).endswith("+"):  # this estimate's value with the gradient of k2
        value = value.detach() + (u * u - (u * u).detach()) / 2
    return value


def rollout_correction(
    old_logp: Tensor, rollout_logp: Tensor, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None,
    mode: str = "token_truncate", low: float | None = None, high: float | None = 2.0, veto: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(old_logp.dtype, torch.float32)
    sequence, sequences = _sequence_of(old_logp, cu_seqlens)
    keep = torch.ones_like(sequence, dtype=torch.bool) if mask is None else mask.bool().flatten()
    own = torch.where(keep, old_logp.flatten().to(dtype) - rollout_logp.flatten().to(dtype), 0)

    def total(x: Tensor) -> Tensor:
        return torch.zeros(sequences, dtype=x.dtype, device=x.device).index_add(0, sequence, x)[sequence]

    level, action = mode.split("_")
    log_ratio = own if level == "token" else total(own)
    if level == "geometric":
        log_ratio = log_ratio / total(keep.to(dtype)).clamp_min(1)
    ratio = log_ratio.exp()
    least, most = 0.0 if low is None else low, math.inf if high is None else high
    if action == "truncate":
        weights = ratio.clamp(least, most)
    else:
        keep = keep & (ratio >= least) & (ratio <= most)
        weights = ratio
    if veto is not None:
        keep = keep & (total((own < math.log(veto)).to(dtype)) == 0)
    return torch.where(keep, weights, 0).reshape(old_logp.shape), keep.reshape(old_logp.shape)


def replay_routing(router_logits: Tensor, recorded_ids: Tensor, *, renormalize: bool = True) -> Tensor:
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    weights = logits.softmax(-1).gather(-1, recorded_ids.long())
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights
