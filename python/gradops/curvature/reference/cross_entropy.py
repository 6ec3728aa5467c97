import torch
from torch import Tensor


def cross_entropy(input: Tensor, target: Tensor, weight: None = None, *, ignore_index: int = -100,
                  reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    z = input if input.dim() == 1 else input.movedim(1, -1)
    valid = target != ignore_index
    logp = z.log_softmax(-1)
    loss = -(1 - label_smoothing) * logp.gather(-1, (target * valid)[..., None].long()).squeeze(-1)
    if label_smoothing:
        loss = loss - label_smoothing * logp.mean(-1)
    loss = loss.where(valid, torch.zeros_like(loss))
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / valid.sum()


def softmax_ce_hvp(logits: Tensor, u: Tensor, target: Tensor | None = None, *, reduction: str = "mean",
                   ignore_index: int = -100, label_smoothing: float = 0.0, out: Tensor | None = None) -> Tensor:
    p = logits.softmax(-1)
    h = p * u - p * (p * u).sum(-1, keepdim=True)
    valid = torch.ones_like(h[..., 0], dtype=torch.bool) if target is None else target != ignore_index
    h = h.where(valid[..., None], torch.zeros_like(h)) / (valid.sum().clamp(min=1) if reduction == "mean" else 1)
    return h if out is None else out.copy_(h)
