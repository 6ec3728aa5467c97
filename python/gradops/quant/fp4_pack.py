"""FP4 codes as bytes, two to each; the words of `gptq_pack`, read as bytes."""
import torch
from torch import Tensor

from .._checks import check_tensor
from .gptq_pack import _pack, _unpack


def pack_fp4(codes: Tensor) -> Tensor:
    """FP4 codes, two to a byte, the first of a pair in the low half: the order of torch's ``float4_e2m1fn_x2``,
    compressed-tensors and torchao.

    Args:
        codes: ``(..., out, in)``, uint8, 0 to 15, an even number of them in a row: those of a
            :class:`QuantizedWeight` on the grid ``"nvfp4"`` or ``"mxfp4"``. A code above 15 loses its upper bits.

    Returns:
        uint8, ``(..., out, in / 2)``.

    Raises:
        TypeError: ``codes`` is not uint8. ValueError: it has fewer than two dimensions, or rows of odd length.

    Example:
        >>> import torch
        >>> from gradops.quant import pack_fp4, unpack_fp4
        >>> packed = pack_fp4(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8))
        >>> packed.tolist(), unpack_fp4(packed).tolist()
        ([[33, 15]], [[1, 2, 15, 0]])
    """
    n = _check(codes, "codes")
    if n % 2:
        raise ValueError(f"codes must have an even number of columns, got {n}")
    return _pack(codes, 4, False).view(torch.uint8)[..., : n // 2].contiguous()


def unpack_fp4(packed: Tensor) -> Tensor:
    """The codes of :func:`pack_fp4`: uint8 ``(..., out, in / 2)`` to uint8 ``(..., out, in)``."""
    n = _check(packed, "packed")
    words = torch.nn.functional.pad(packed, (0, -n % 4)).contiguous().view(torch.int32)
    return _unpack(words, 4, 2 * n, False)


def _check(x: Tensor, name: str) -> int:
    check_tensor(x, name)
    if x.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got {x.dim()}")
    return x.shape[-1]
