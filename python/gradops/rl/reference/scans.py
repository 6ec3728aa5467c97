"""Returns, advantages and V-trace, token by token."""
from itertools import pairwise

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


def discounted_returns(rewards: Tensor, gamma: float, *, terminated: Tensor | None = None,
                       truncated: Tensor | None = None, next_values: Tensor | None = None,
                       last_values: Tensor | None = None, mask: Tensor | None = None,
                       cu_seqlens: Tensor | None = None) -> Tensor:
    def step(r, v, following, more, cut, ratio, carry):
        y = r + gamma * torch.where(cut, following, carry)
        return y, (y,)

    out, = _scan(step, rewards, None, next_values, last_values, terminated, truncated, mask, cu_seqlens)
    return out


def lambda_returns(rewards: Tensor, values: Tensor | None = None, *, gamma: float, lam: float,
                   terminated: Tensor | None = None, truncated: Tensor | None = None,
                   next_values: Tensor | None = None, last_values: Tensor | None = None, mask: Tensor | None = None,
                   cu_seqlens: Tensor | None = None) -> Tensor:
    def step(r, v, following, more, cut, ratio, carry):
        y = r + gamma * torch.where(cut, following, (1 - lam) * following + lam * carry)
        return y, (y,)

    out, = _scan(step, rewards, values, next_values, last_values, terminated, truncated, mask, cu_seqlens)
    return out


def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float, terminated: Tensor | None = None,
        truncated: Tensor | None = None, next_values: Tensor | None = None, last_values: Tensor | None = None,
        mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    def step(r, v, following, more, cut, ratio, carry):
        y = r + gamma * following - v + gamma * lam * more
        return y, (y, y + v)

    advantages, returns = _scan(step, rewards, values, next_values, last_values, terminated, truncated, mask,
                                cu_seqlens, advantages=True)
    return advantages, returns


def vtrace(rewards: Tensor, values: Tensor, log_ratios: Tensor, *, gamma: float, lam: float = 1.0,
           rho_clip: float = 1.0, c_clip: float = 1.0, terminated: Tensor | None = None,
           truncated: Tensor | None = None, next_values: Tensor | None = None, last_values: Tensor | None = None,
           mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    def step(r, v, following, more, cut, ratio, carry):
        rho, c = ratio.clamp(max=rho_clip), ratio.clamp(max=c_clip)
        delta = r + gamma * following - v
        y = rho * delta + gamma * lam * c * more
        return y, (rho * (delta + gamma * more), y + v)

    advantages, returns = _scan(step, rewards, values, next_values, last_values, terminated, truncated, mask,
                                cu_seqlens, ratios=log_ratios, advantages=True)
    return advantages, returns


def _scan(step, rewards, values, next_values, last_values, terminated, truncated, mask, cu_seqlens, ratios=None,
          advantages=False) -> Tensors:
    """Walks each row from its end. step: (reward, value, value that follows, carry or 0 at a cut, cut, ratio, carry)
    -> (carry, outputs)."""
    def wide(x):
        return x if x is None or x.dtype == torch.float64 else x.float()

    rewards, values, next_values, last_values = map(wide, (rewards, values, next_values, last_values))
    ratios = wide(ratios).exp() if ratios is not None else None
    tokens = (rewards, values, next_values, ratios, terminated, truncated, mask)
    if cu_seqlens is None:
        return _rows(step, tokens, last_values, advantages)
    bounds = cu_seqlens.tolist()
    rows = [_rows(step, [x if x is None else x[b:e] for x in tokens],
                  last_values if last_values is None else last_values[i], advantages)
            for i, (b, e) in enumerate(pairwise(bounds))]
    outputs = 2 if advantages else 1
    return tuple(torch.cat([row[i] for row in rows]) if rows else rewards.clone() for i in range(outputs))


def _rows(step, tokens, last_values, advantages) -> Tensors:
    rewards, values, next_values, ratios, terminated, truncated, mask = tokens
    zero = torch.zeros_like(rewards[..., :0].sum(-1))
    never = torch.zeros_like(zero, dtype=torch.bool)
    following = zero if last_values is None else last_values  # the value of the next token that counts
    carry = zero if advantages else following
    fresh = ~never  # no token that counts was met yet
    outputs = []
    for t in reversed(range(rewards.shape[-1])):
        counts = ~never if mask is None else mask[..., t]
        end = never if terminated is None else terminated[..., t]
        cut = end if truncated is None else end | truncated[..., t]
        after = following if next_values is None else next_values[..., t]
        if next_values is not None and not advantages:
            carry = torch.where(fresh & counts, after, carry)
        ratio = None if ratios is None else ratios[..., t]
        v = None if values is None else values[..., t]
        y, out = step(rewards[..., t], v, torch.where(end, 0, after), torch.where(cut, 0, carry), cut, ratio, carry)
        outputs.append([torch.where(counts, x, 0) for x in out])
        carry, fresh = torch.where(counts, y, carry), fresh & ~counts
        if v is not None:
            following = torch.where(counts, v, following)
    if not outputs:
        return (rewards.clone(),) * (2 if advantages else 1)
    return tuple(torch.stack(out[::-1], -1) for out in zip(*outputs, strict=True))
