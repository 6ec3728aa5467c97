"""linear_logprob and one_token_rollout_loss in plain PyTorch."""
from collections.abc import Sequence

import torch
from torch import Tensor

from .logp import selective_log_softmax


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
                   temperature: float = 1.0, softcap: float | None = None, return_: Sequence[str] = ("logp",),
                   out_dtype: torch.dtype = torch.float32, chunk_size: int = 4096,
                   ) -> Tensor | tuple[Tensor, ...]:
    """In the dtype of hidden, but for the last step; whole, and without a group."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return selective_log_softmax(logits, targets, temperature=temperature, softcap=softcap, return_=return_,
                                 out_dtype=out_dtype)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def one_token_rollout_loss(logits: Tensor, targets: Tensor, *, temperature: float = 1.5, beta: float = -0.1,
                           k: int | None = None, seeds: Tensor | None = None,
                           generator: torch.Generator | None = None, reduction: str = "mean") -> Tensor:
    """In the dtype of logits. Draws other samples than the kernels for the same seeds."""
    logp = logits.log_softmax(-1)
    q = (logits.detach() / temperature).softmax(-1)
    index = targets[..., None]
    if k is None:
        reward = torch.full_like(q, beta).scatter(-1, index, 1.0)
        terms = q * reward * torch.where(q == 0, 0.0, logp)
        return _reduce(-terms.sum(-1), reduction)
    rows = q.reshape(-1, q.shape[-1])
    if seeds is None:
        samples = torch.multinomial(rows, k, replacement=True, generator=generator)
    else:
        samples = torch.stack([
            torch.multinomial(row, k, replacement=True, generator=torch.Generator().manual_seed(seed))
            for row, seed in zip(rows, seeds.flatten().tolist(), strict=True)])
    samples = samples.reshape(*targets.shape, k)
    reward = torch.where(samples == index, 1.0, beta)
    return _reduce(-(reward * logp.gather(-1, samples)).mean(-1), reduction)

