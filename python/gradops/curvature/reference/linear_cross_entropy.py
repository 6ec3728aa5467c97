import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.functional import linear

from .cross_entropy import cross_entropy, softmax_ce_hvp


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
                         ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    z = linear(hidden.flatten(0, -2), weight, bias)
    loss = cross_entropy(z, target.flatten(), ignore_index=ignore_index, reduction=reduction,
                         label_smoothing=label_smoothing)
    return loss.reshape(target.shape) if reduction == "none" else loss


def linear_ce_ggnvp(h: Tensor, W: Tensor, h_dot: Tensor | None, W_dot: Tensor | None, targets: Tensor | None, *,
                    reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0,
                    ) -> tuple[Tensor, Tensor]:
    dots = tuple(torch.zeros_like(x) if dot is None else dot for x, dot in ((h, h_dot), (W, W_dot)))
    z, u = jvp(linear, (h, W), dots)
    return vjp(linear, h, W)[1](softmax_ce_hvp(z, u, targets, reduction=reduction, ignore_index=ignore_index))
