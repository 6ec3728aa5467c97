"""Weights and likelihoods of rankings, in plain PyTorch."""
from itertools import pairwise

import torch
from torch import Tensor


def permutation_weights(answer_logp: Tensor, cu_seqlens: Tensor, *, offsets: Tensor | None = None,
                        group_size: int | None = None, tau: float = 1.0) -> Tensor:
    answers = cu_seqlens.tolist()
    means = torch.stack([answer_logp[b:e].mean() for b, e in pairwise(answers)])
    groups = range(0, len(means) + 1, group_size) if group_size else offsets.tolist()  # type: ignore[union-attr]
    return torch.cat([(means[b:e] / tau).softmax(0) for b, e in pairwise(groups)])


def plackett_luce_logprob(scores: Tensor, permutation: Tensor) -> Tensor:
    """One row of probabilities over what is left, per place: O(n k) memory, differentiable to any order."""
    left, ranked = left_over(permutation, scores.shape[-1])
    choices = scores[..., None, :].masked_fill(~left, -torch.inf).log_softmax(-1)
    chosen = choices.gather(-1, permutation.clamp_min(0)[..., None])[..., 0]
    return torch.where(ranked, chosen, 0).sum(-1)


def left_over(permutation: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """[..., k, n]: is the item still there at that place; [..., k]: does the ranking have that place."""
    ranked = (permutation < 0).cumsum(-1) == 0
    taken = (permutation[..., None] == torch.arange(n, device=permutation.device)) & ranked[..., None]
    return taken.cumsum(-2) - taken.long() == 0, ranked


def plackett_luce_sample(scores: Tensor, k: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """Item by item, without the Gumbel trick: another stream of random numbers, the same distribution."""
    left, places = scores.clone(), []
    for _ in range(scores.shape[-1] if k is None else k):
        probs = left.softmax(-1)
        some = ~probs.isnan().any(-1)
        drawn = torch.multinomial(probs.nan_to_num(1.0).reshape(-1, probs.shape[-1]), 1, generator=generator)
        item = drawn.reshape(*scores.shape[:-1], 1)
        left = left.scatter(-1, item, -torch.inf)
        places.append(torch.where(some[..., None], item, -1))
    return torch.cat(places, -1)
