"""Layer and RMS norm, written out: torch's own `layer_norm` has a wrong derivative in reverse over forward mode."""
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    y = rms_norm(centered, weight, eps)
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight
