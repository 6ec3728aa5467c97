"""Log-probabilities: selective_log_softmax and top_p_keep in plain PyTorch."""
from collections.abc import Sequence

import torch
from torch import Tensor


def _kept(logits: Tensor, keep_ids: Tensor, keep_offsets: Tensor) -> Tensor:
    """The keep sets as a mask of the shape of logits."""
    mask = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).view(-1, logits.shape[-1])
    counts = keep_offsets.diff()
    mask[torch.repeat_interleave(torch.arange(len(counts), device=logits.device), counts), keep_ids] = True
    return mask.view(logits.shape)


def selective_log_softmax(logits: Tensor, index: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
                          keep_ids: Tensor | None = None, keep_offsets: Tensor | None = None, renormalize: bool = True,
                          return_: Sequence[str] = ("logp",), out_dtype: torch.dtype = torch.float32,
                          ) -> Tensor | tuple[Tensor, ...]:
    """In the dtype of logits, but for the last step."""
    z = logits if softcap is None else torch.where(logits == -torch.inf, logits, softcap * (logits / softcap).tanh())
    z = z / temperature
    kept = None if keep_ids is None or keep_offsets is None else _kept(logits, keep_ids, keep_offsets)
    if kept is not None and renormalize:
        z = z.masked_fill(~kept, -torch.inf)
    logp_all = z.log_softmax(-1)
    p = logp_all.exp()
    single = index.dim() == logits.dim() - 1
    at = index[..., None] if single else index
    logp = logp_all.gather(-1, at)
    if kept is not None and not renormalize:
        logp = logp.masked_fill(~kept.gather(-1, at), -torch.inf)
    out = {
        "logp": logp.squeeze(-1) if single else logp,
        "lse": z.logsumexp(-1),
        "entropy": -(p * torch.where(logp_all == -torch.inf, 0, logp_all)).sum(-1),
        "sum_p2": p.square().sum(-1),
        "sum_p3": p.pow(3).sum(-1),
    }
    results = tuple(out[name].to(out_dtype) for name in return_)
    return results[0] if len(results) == 1 else results


def top_p_keep(logits: Tensor, p: float, always_keep: Tensor | None = None, min_keep: int = 1,
               ) -> tuple[Tensor, Tensor]:
    sorted_p, order = torch.sort(logits.softmax(-1), -1, descending=True, stable=True)
    before = sorted_p.cumsum(-1) - sorted_p  # the mass of the likelier ones: below p, or this one is not needed
    keep_sorted = before < p
    keep_sorted[..., :min_keep] = True
    keep = torch.zeros_like(keep_sorted).scatter(-1, order, keep_sorted)
    if always_keep is not None:
        keep = keep.scatter(-1, always_keep.expand(*logits.shape[:-1], always_keep.shape[-1]), True)
    keep = keep.reshape(-1, logits.shape[-1])
    counts = torch.cat([torch.zeros(1, dtype=torch.int64, device=keep.device), keep.sum(-1)])
    return keep.nonzero()[:, 1].contiguous(), counts.cumsum(0)
