"""GPTQ checkpoint tensors, a bit at a time."""
import torch
from torch import Tensor

from .._columns import QuantizedWeight


def _to_words(codes: Tensor, bits: int) -> Tensor:
    """(..., n) to int32 (..., ceil(n bits / 32)): the stream of bits, then 32 of them to a word."""
    stream = (codes[..., None].long() >> torch.arange(bits, device=codes.device) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (stream << torch.arange(32, device=codes.device)).sum(-1).to(torch.int32)


def _to_codes(words: Tensor, bits: int, n: int) -> Tensor:
    stream = (words[..., None].long() >> torch.arange(32, device=words.device) & 1).flatten(-2)[..., : n * bits]
    return (stream.unflatten(-1, (n, bits)) << torch.arange(bits, device=words.device)).sum(-1)


def pack_gptq(q: QuantizedWeight, *, bits: int, checkpoint_format: str = "gptq") -> dict[str, Tensor]:
    zeros = q.zeros.mT.long() - (1 if checkpoint_format == "gptq" else 0)
    return {"qweight": _to_words(q.codes, bits).mT, "qzeros": _to_words(zeros, bits), "scales": q.scales.mT.half(),
            "g_idx": q.g_idx}  # fmt: skip


def unpack_gptq(tensors: dict[str, Tensor], *, bits: int, checkpoint_format: str = "gptq") -> QuantizedWeight:
    scales, g_idx = tensors["scales"].mT.float(), tensors["g_idx"]
    codes = _to_codes(tensors["qweight"].mT, bits, g_idx.shape[-1])
    zeros = _to_codes(tensors["qzeros"], bits, scales.shape[-2]).mT.float() + (checkpoint_format == "gptq")
    where = g_idx.long()[..., None, :].expand(codes.shape)
    weight = scales.take_along_dim(where, -1) * (codes - zeros.take_along_dim(where, -1))
    loss, info = weight.new_zeros(weight.shape[:-1]), weight.new_zeros(weight.shape[:-2], dtype=torch.int32)
    return QuantizedWeight(codes.to(torch.uint8), scales, zeros, g_idx, weight, loss, info)


def pack_fp4(codes: Tensor) -> Tensor:
    return codes[..., ::2] & 15 | codes[..., 1::2] << 4


def unpack_fp4(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
