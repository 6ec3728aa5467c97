"""Quantised weights as GPTQ checkpoints hold them."""
import torch
from torch import Tensor

from .._checks import check_one_of, check_tensor
from .._op import register
from ._columns import QuantizedWeight

FORMATS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)


def _packed_fake(codes: Tensor, bits: int, transposed: bool) -> Tensor:
    rows, cols = codes.shape[-2:]
    words = (cols * bits + 31) // 32
    return codes.new_empty((*codes.shape[:-2], *((words, rows) if transposed else (rows, words))), dtype=torch.int32)


def _unpacked_fake(words: Tensor, bits: int, cols: int, transposed: bool) -> Tensor:
    return words.new_empty((*words.shape[:-2], words.shape[-1 if transposed else -2], cols), dtype=torch.uint8)


_pack = register("gptq_pack", fake=_packed_fake)
_unpack = register("gptq_unpack", fake=_unpacked_fake)


def pack_gptq(q: QuantizedWeight, *, bits: int, checkpoint_format: str = "gptq") -> dict[str, Tensor]:
    """The tensors of a GPTQ checkpoint: what vLLM, transformers and GPTQModel read.

    Args:
        q: a weight on the integer grid, ``(..., out, in)``.
        bits: 2, 3, 4 or 8, as it was quantised.
        checkpoint_format: ``"gptq"`` stores zero points less one, ``"gptq_v2"`` as they are.

    Returns:
        ``qweight``: int32 ``(..., ceil(in bits / 32), out)``; down a column the codes are one stream of bits, lowest
        first (so that with 3 bits, 32 codes take 3 words). ``qzeros``: int32 ``(..., groups, ceil(out bits / 32))``,
        likewise along a row. ``scales``: float16 ``(..., groups, out)``. ``g_idx``: int32 ``(..., in)``.

    Raises:
        TypeError: ``q`` is no :class:`QuantizedWeight`.
        ValueError: a code or zero point needs more bits; a scale is 0, infinite or NaN in float16; or a zero point is
            0, which ``"gptq"`` cannot store: readers disagree on it.

    Scales are rounded to float16; quantise with ``scale_dtype=torch.float16`` and the checkpoint stands for
    ``q.weight`` exactly. The checks read the tensors back to the host.

    Example:
        >>> import torch
        >>> from gradops.quant import pack_gptq, rtn_quantize
        >>> q = rtn_quantize(torch.randn(16, 64), group_size=32, scale_dtype=torch.float16)
        >>> {name: tuple(t.shape) for name, t in pack_gptq(q, bits=4).items()}
        {'qweight': (8, 16), 'qzeros': (2, 2), 'scales': (2, 16), 'g_idx': (64,)}
    """
    if not isinstance(q, QuantizedWeight):
        raise TypeError(f"q must be a QuantizedWeight, got {type(q).__name__}")
    check_one_of(bits, "bits", BITS)
    check_one_of(checkpoint_format, "checkpoint_format", FORMATS)
    scales, zeros = q.scales.mT.to(torch.float16).contiguous(), q.zeros.mT
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError("q.scales must be positive finite numbers in float16 (quantise with "
                         "scale_dtype=torch.float16), "
                         f"got scales from {float(q.scales.min())} to {float(q.scales.max())}")
    most = 2**bits - 1
    if q.codes.numel() and int(q.codes.max()) > most:
        raise ValueError(f"q.codes must be at most {most} with bits={bits}, got {int(q.codes.max())}")
    low, high = (0, most) if checkpoint_format == "gptq_v2" else (1, most + 1)
    if not bool(((zeros >= low) & (zeros <= high)).all()):
        raise ValueError(f"q.zeros must be {low} to {high} with bits={bits} and "
                         f"checkpoint_format={checkpoint_format!r}, got {float(zeros.min())} to {float(zeros.max())}")
    stored = (zeros - low).round().to(torch.uint8)
    return {"qweight": _pack(q.codes, bits, True), "qzeros": _pack(stored, bits, False), "scales": scales,
            "g_idx": q.g_idx}  # fmt: skip


def unpack_gptq(tensors: dict[str, Tensor], *, bits: int, checkpoint_format: str = "gptq") -> QuantizedWeight:
    """The weight that the tensors of a GPTQ checkpoint stand for; see :func:`pack_gptq`.

    Returns:
        :class:`QuantizedWeight`, with ``weight`` in float32 and ``loss`` and ``info`` zero: a checkpoint has neither.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: one is missing, shapes do not fit together, or ``g_idx`` names a group that is not there.

    Example:
        >>> import torch
        >>> from gradops.quant import pack_gptq, rtn_quantize, unpack_gptq
        >>> q = rtn_quantize(torch.randn(16, 64), group_size=32, scale_dtype=torch.float16)
        >>> torch.equal(unpack_gptq(pack_gptq(q, bits=4), bits=4).weight, q.weight)
        True
    """
    check_one_of(bits, "bits", BITS)
    check_one_of(checkpoint_format, "checkpoint_format", FORMATS)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        if name not in tensors:
            raise ValueError(f"tensors must hold {name!r}, got {sorted(tensors)}")
        check_tensor(tensors[name], name)
    qweight, qzeros, scales, g_idx = (tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
    for x, name in ((qweight, "qweight"), (qzeros, "qzeros")):
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {x.dtype}")
    n, (groups, out) = g_idx.shape[-1], scales.shape[-2:]
    for x, name, want in ((qweight, "qweight", ((n * bits + 31) // 32, out)),
                          (qzeros, "qzeros", (groups, (out * bits + 31) // 32))):
        if tuple(x.shape[-2:]) != want:
            raise ValueError(f"{name} must end in {want} for g_idx of {n} and scales {tuple(scales.shape)}, "
                             f"got {tuple(x.shape)}")
    if n and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(f"g_idx must be 0 to {groups - 1}, got {int(g_idx.min())} to {int(g_idx.max())}")
    codes = _unpack(qweight, bits, n, True)
    zeros = _unpack(qzeros, bits, out, False).mT.float() + (1 if checkpoint_format == "gptq" else 0)
    scales = scales.mT.float()
    where = g_idx.long()[..., None, :].expand(codes.shape)
    weight = scales.take_along_dim(where, -1) * (codes - zeros.take_along_dim(where, -1))
    rows = weight.new_zeros(weight.shape[:-1])
    return QuantizedWeight(codes, scales.contiguous(), zeros.contiguous(), g_idx.int(), weight, rows,
                           rows.new_zeros(weight.shape[:-2], dtype=torch.int32))  # fmt: skip
