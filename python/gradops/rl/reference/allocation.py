"""Budgets of rollouts and curricula over categories."""
import torch
from torch import Tensor


def allocate_rollouts(p: Tensor, budget: int, *, low: int = 2, high: int = 128, method: str = "exact") -> Tensor:
    p, counts = p.double(), torch.arange(low, high + 1, dtype=torch.float64)
    utility = counts * (1 - p[:, None]) * (1 - (1 - p[:, None]) ** (counts - 1))
    spare = min(budget - low * len(p), (high - low) * len(p))
    taken = torch.zeros(len(p), dtype=torch.int64)
    if method == "greedy":
        for _ in range(spare):
            gains = torch.stack([utility[i, k + 1] - utility[i, k] if k < high - low else -counts[-1]
                                 for i, k in enumerate(taken.tolist())])
            if gains.max() <= 0:
                break
            taken[gains.argmax()] += 1
        return taken + low
    best, choices = torch.zeros(spare + 1, dtype=torch.float64), []
    for row in utility:
        options = torch.full((high - low + 1, spare + 1), -torch.inf, dtype=torch.float64)
        for k in range(min(high - low, spare) + 1):
            options[k, k:] = best[: spare + 1 - k] + (row[k] - row[0])
        best, choice = options.max(0)
        choices.append(choice)
    left = spare
    for i in reversed(range(len(p))):
        taken[i] = choices[i][left]
        left -= int(taken[i])
    return taken + low


def curriculum_update(q: Tensor, categories: Tensor, advantages: Tensor, alpha: float,
                      unseen: str = "decay") -> Tensor:
    out = q.clone()
    for c in range(len(q)):
        mine = advantages[categories == c]
        if len(mine) or unseen == "decay":
            reward = mine.abs().double().mean().to(q.dtype) if len(mine) else 0
            out[c] = (1 - alpha) * q[c] + alpha * reward
    return out


def curriculum_probs(q: Tensor, tau: float) -> Tensor:
    weights = (q / tau - (q / tau).max()).exp()
    return weights / weights.sum()
