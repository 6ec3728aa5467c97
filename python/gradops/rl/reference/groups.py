"""Groups of rewards, group by group in Python."""
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..presets import PRESETS, settle


def group_index(labels: Tensor | Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    known: dict[Any, int] = {}
    values = labels.tolist() if isinstance(labels, Tensor) else labels
    ids = torch.tensor([known.setdefault(v, len(known)) for v in values], dtype=torch.int64)
    counts = torch.bincount(ids, minlength=len(known))
    return ids, torch.argsort(ids, stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _members(n: int, offsets: Tensor | None, ids: Any, group_size: int | None, *more: Tensor | None) -> list[Tensor]:
    """The indices of every group, in order of first appearance."""
    if offsets is not None:
        keys = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.cpu().diff()).tolist()
    elif ids is not None:
        columns = ids if isinstance(ids, tuple) else (ids,)
        keys = list(zip(*(c.tolist() for c in columns), strict=True))
    else:
        keys = [i // group_size for i in range(n)]  # type: ignore[operator]
    for column in more:
        if column is not None:
            keys = list(zip(keys, column.tolist(), strict=True))
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return [torch.tensor(g) for g in groups.values()]


def segment_stats(x: Tensor, *, offsets: Tensor | None = None, ids: Tensor | None = None,
                  num_groups: int | None = None, valid: Tensor | None = None,
                  weights: Tensor | None = None) -> tuple[Tensor, ...]:
    n = x.shape[-1]
    if offsets is not None:
        members = [torch.arange(a, b) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    else:
        members = [torch.nonzero(ids == g)[:, 0] for g in range(num_groups)]  # type: ignore[arg-type]
    w = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    if valid is not None:
        w = w * valid
    rows = []
    for g in members:
        g = g[w[g] > 0]
        v, u = x[..., g].double(), w[g]
        count = u.sum().expand(x.shape[:-1])
        mean = (u * v).sum(-1) / count if len(g) else torch.zeros_like(count)
        m2 = (u * (v - mean[..., None]) ** 2).sum(-1)
        low = v.amin(-1) if len(g) else torch.full_like(count, math.inf)
        high = v.amax(-1) if len(g) else torch.full_like(count, -math.inf)
        rows.append(torch.stack([count, mean, m2, low, high], -1))
    return torch.stack(rows, -1).unbind(-2) if rows else tuple(x.new_zeros(5, *x.shape[:-1], 0, dtype=torch.float64))


def _std(v: Tensor, w: Tensor, correction: float) -> Tensor:
    if bool((v == v[0]).all()):
        return v.new_zeros(())
    mean = (w * v).sum() / w.sum()
    return ((w * (v - mean) ** 2).sum() / (w.sum() - correction)).sqrt()


def _divisor(spread: Tensor | float, s: dict[str, Any]) -> Tensor:
    spread = torch.as_tensor(spread, dtype=torch.float64)
    if s["eps_mode"] == "add":
        d = spread + s["eps"]
    elif s["eps_mode"] == "max":
        d = spread.clamp(min=s["eps"])
    else:
        d = (spread**2 + s["eps"]).sqrt()
    return torch.where(d == 0, torch.inf, d)


def _group(r: Tensor, w: Tensor, lengths: Tensor, s: dict[str, Any], batch: Tensor) -> tuple[Tensor, bool]:
    """Advantages of one group of valid rewards; whether the rule for singletons made them."""
    n, correction, scale = len(r), s["correction"], s["scale"]
    if n < 2 or (scale in ("group", "loo") and w.sum() <= correction * (1 + 1e-9)):
        if s["singleton"] != "keep":
            return torch.zeros_like(r), True
        return r / (1 if scale == "none" else _divisor(batch if scale == "batch" else 1.0, s)), True
    if bool((r == r[0]).all()) and s["degenerate"] == "zero":
        return torch.zeros_like(r), False
    mean = r[0] + (w * (r - r[0])).sum() / w.sum()
    others = [torch.arange(n) != i for i in range(n)]
    if s["baseline"] == "mean":
        a = r - mean
    elif s["baseline"] == "loo":
        a = torch.stack([r[i] - r[0] - ((r[o] - r[0]) * w[o]).sum() / w[o].sum() for i, o in enumerate(others)])
    elif s["baseline"] == "opo":
        a = r - r[0] - (w * lengths * (r - r[0])).sum() / (w * lengths).sum()
    elif s["baseline"] == "max2":
        top = r.topk(2)
        a = torch.zeros_like(r)
        a[top.indices[0]] = top.values[0] - top.values[1]
        a = a + 0 * r.sum()
    else:
        a = r.clone()
    if scale == "group":
        a = a / _divisor(_std(r, w, correction), s)
    elif scale == "batch":
        a = a / _divisor(batch, s)
    elif scale == "mean":
        a = a / _divisor(mean, s)
    elif scale == "loo":
        for i, o in enumerate(others):
            single = n < 3 or w[o].sum() <= correction
            spread = _std(r[o], w[o], correction) if not single else torch.ones(())
            a[i] = a[i] / (_divisor(spread, s) if spread != 0 else 1)
    return a, False


def group_advantages(rewards: Tensor, *, offsets: Tensor | None = None, ids: Any = None, group_size: int | None = None,
                     baseline: str | None = None, scale: str | None = None, correction: float | None = None,
                     eps: float | None = None, eps_mode: str | None = None, singleton: str | None = None,
                     degenerate: str | None = None, valid: Tensor | None = None, weights: Tensor | None = None,
                     strata: Tensor | None = None, alpha: float = 1.0, lengths: Tensor | None = None,
                     preset: str | None = None, compat: str | None = None) -> tuple[Tensor, Tensor]:
    given = {"baseline": baseline, "scale": scale, "correction": correction, "eps": eps, "eps_mode": eps_mode,
                 "singleton": singleton, "degenerate": degenerate}
    s = settle(given, preset, compat)
    out_dtype = torch.promote_types(rewards.dtype, torch.float32)
    where = {"offsets": offsets, "ids": ids, "group_size": group_size}
    n = len(rewards)
    if preset == "gdpo":
        columns = rewards[:, None] if rewards.dim() == 1 else rewards
        parts = [group_advantages(c, **where, **s, valid=valid if compat != "trl" else ~c.isnan()) for c in columns.T]
        w = torch.ones(len(parts)) if weights is None else weights
        total = sum(u * a.double() for u, (a, _) in zip(w.tolist(), parts, strict=True))
        if compat == "trl":
            valid = ~columns.isnan().all(1)
        last: dict[str, Any] = {"eps": s["eps"], "correction": s["correction"], "eps_mode": s["eps_mode"]}
        if compat == "verl":
            last = {"eps": 1e-8, "eps_mode": "var", "weights": lengths}
        a, _ = group_advantages(total, group_size=n, valid=valid, **last)  # type: ignore[arg-type]
        return a.to(out_dtype), torch.stack([d for _, d in parts]).all(0)
    r = rewards.double()
    w = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    length = w if lengths is None else lengths.double()
    keep = w > 0
    if valid is not None:
        keep = keep & valid
    if compat == "trl":
        keep = keep & ~r.isnan()
    batch = r.new_zeros(())
    if s["scale"] == "batch" and keep.sum() > 0 and w[keep].sum() > s["correction"]:
        batch = _std(r[keep], w[keep], s["correction"])

    def over(groups: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.zeros_like(r)
        degenerate, single = torch.zeros_like(r, dtype=torch.bool), torch.zeros_like(r, dtype=torch.bool)
        for g in groups:
            v = g[keep[g]]
            degenerate[g] = len(v) < 2 or bool((r[v] == r[v[0]]).all())
            if len(v):
                out[v], single[v] = _group(r[v], w[v], length[v], s, batch)
        return out, degenerate, single

    out, is_degenerate, _ = over(_members(n, offsets, ids, group_size))
    if strata is not None:
        inside, _, single = over(_members(n, offsets, ids, group_size, strata))
        blended = inside if alpha == 1 else alpha * inside + (1 - alpha) * out
        out = torch.where(single, out, blended) if s["singleton"] == "group" else blended
    if preset == "adora":
        assert lengths is not None
        out = out * adora_weights(rewards, lengths, **where, valid=valid).double()
    assert preset is None or preset in PRESETS
    return out.to(out_dtype), is_degenerate


def trajectory_advantages(rewards: Tensor, trajectory_ids: Tensor, segment_offsets: Tensor, *, eps: float = 1e-6,
                          singleton: str = "keep") -> Tensor:
    out = torch.zeros(len(rewards), dtype=torch.promote_types(rewards.dtype, torch.float32))
    for a, b in pairwise(segment_offsets.tolist()):
        ids, _, _ = group_index(trajectory_ids[a:b])
        if b == a:
            continue
        first = torch.stack([torch.nonzero(ids == t)[0, 0] for t in range(int(ids.max()) + 1)])
        own, _ = group_advantages(rewards[a:b][first], group_size=len(first), eps=eps, singleton=singleton)
        out[a:b] = own[ids]
    return out


ADORA_RULES = {"paper_vlm": (0.5, math.inf), "repo_vl": (0.5, 4094.0), "repo_llm": (1.01, 4054.0)}


def adora_weights(rewards: Tensor, lengths: Tensor, *, offsets: Tensor | None = None, ids: Any = None,
                  group_size: int | None = None, rule: str = "paper_vlm", factor: float = 0.1,
                  threshold: float | None = None, max_length: float | None = None,
                  valid: Tensor | None = None) -> Tensor:
    limits = ADORA_RULES[rule]
    threshold = limits[0] if threshold is None else threshold
    max_length = limits[1] if max_length is None else max_length
    out = torch.full_like(rewards, factor, dtype=torch.promote_types(rewards.dtype, torch.float32))
    keep = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    for g in _members(len(rewards), offsets, ids, group_size):
        right = g[(rewards[g] > threshold) & keep[g]]
        wrong = g[(rewards[g] <= threshold) & (lengths[g] < max_length) & keep[g]]
        if len(right) == 0:
            hard = rule != "repo_llm"
        elif len(wrong) == 0:
            hard = rule == "repo_llm"
        else:
            hard = bool(lengths[right].max() > lengths[wrong].double().mean())
        if hard:
            out[g] = 1
    return out


def group_top_k_mask(rewards: Tensor, k: int, *, offsets: Tensor | None = None, ids: Any = None,
                     group_size: int | None = None, valid: Tensor | None = None, duplicates: Tensor | None = None,
                     alpha: float = 1.0) -> Tensor:
    mask = torch.zeros(len(rewards), dtype=torch.bool)
    for g in _members(len(rewards), offsets, ids, group_size):
        if valid is not None:
            g = g[valid[g]]
        score = {}
        for i in g.tolist():
            copies = 1 if duplicates is None else int((duplicates[g] == duplicates[i]).sum())
            score[i] = float(rewards[i]) - (alpha * math.log(copies) if copies > 1 else 0)
        usable = [i for i in score if not math.isnan(score[i])]
        for i in sorted(usable, key=lambda i: (-score[i], i))[:k]:
            mask[i] = True
    return mask
