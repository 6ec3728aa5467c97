"""Pairs rotated as complex numbers are multiplied."""
import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int | None = None) -> Tensor:
    r = x.shape[-1] if rotary_dim is None else rotary_dim
    if cos.shape[-1] == r:
        cos, sin = (t[..., ::2] if interleaved else t[..., :r // 2] for t in (cos, sin))
    a, b = (x[..., 0:r:2], x[..., 1:r:2]) if interleaved else (x[..., :r // 2], x[..., r // 2:r])
    pair = (a * cos - b * sin, a * sin + b * cos)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((y, x[..., r:]), -1)
