"""The product with a packed weight: unpack, then multiply."""
import torch
from torch import Tensor

from .pack import unpack_gptq


def dequant_linear(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None = None,
                   bias: Tensor | None = None, *, bits: int, group_size: int = -1,
                   checkpoint_format: str = "gptq") -> Tensor:
    if g_idx is None:
        g_idx = torch.arange(x.shape[-1], device=x.device) // (group_size if group_size > 0 else max(1, x.shape[-1]))
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}
    q = unpack_gptq(tensors, bits=bits, checkpoint_format=checkpoint_format)
    # once more, for scales in float64; codes - zeros is exact in any dtype
    wide = torch.promote_types(x.dtype, torch.float32)
    where = g_idx.long().expand(q.codes.shape)
    weight = scales.mT.to(wide).take_along_dim(where, -1) * (q.codes - q.zeros.take_along_dim(where, -1)).to(wide)
    return torch.nn.functional.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)
