"""A linear layer that holds the tensors of a GPTQ checkpoint."""
import torch
from torch import Tensor

from .._checks import check_one_of
from ._columns import QuantizedWeight
from .dequant_linear import dense_weight, dequant_linear
from .gptq_pack import BITS, FORMATS, pack_gptq


class QuantizedLinear(torch.nn.Module):
    """``torch.nn.Linear`` with its weight in the packed form of GPTQ checkpoints; see :func:`dequant_linear`.

    The buffers ``qweight``, ``qzeros``, ``scales``, ``g_idx`` and ``bias`` have the names and shapes that checkpoints
    give them, so that ``load_state_dict`` takes a layer of one. A new layer is all zeros.

    Args:
        in_features, out_features: as of ``torch.nn.Linear``.
        bias: whether there is one.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group; -1: all are one group.
        checkpoint_format: ``"gptq"``, where zero points are stored less one, or ``"gptq_v2"``.
        dtype: of the scales and of the bias.

    Raises:
        ValueError: an argument is outside of its range.

    Derivatives reach the input, as fine-tuning of adapters needs; the weight is a constant.

    Example:
        >>> import torch
        >>> from gradops.quant import QuantizedLinear, rtn_quantize
        >>> q = rtn_quantize(torch.randn(16, 64), group_size=32, scale_dtype=torch.float16)
        >>> layer = QuantizedLinear.from_quantized(q, bits=4, group_size=32)
        >>> layer
        QuantizedLinear(in_features=64, out_features=16, bias=False, bits=4, group_size=32)
        >>> x = torch.randn(3, 64)
        >>> torch.allclose(layer(x), x @ q.weight.T, atol=1e-5)
        True
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, bits: int, group_size: int,
                 checkpoint_format: str = "gptq", dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        check_one_of(bits, "bits", BITS)
        check_one_of(checkpoint_format, "checkpoint_format", FORMATS)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be positive, got {in_features} and {out_features}")
        if group_size != -1 and group_size < 1:
            raise ValueError(f"group_size must be positive, or -1 for all inputs, got {group_size}")
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.checkpoint_format = checkpoint_format
        size = in_features if group_size == -1 else group_size
        groups = -(-in_features // size)
        self.register_buffer("qweight", torch.zeros((in_features * bits + 31) // 32, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, (out_features * bits + 31) // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=dtype))
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // size)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, bias: Tensor | None = None, *, bits: int, group_size: int,
                       checkpoint_format: str = "gptq") -> "QuantizedLinear":
        """The layer of a quantised weight ``(out, in)``, on its device. ``bias``: ``(out,)``; it keeps its dtype.

        Raises:
            TypeError, ValueError: as :func:`pack_gptq`, or ``q`` is not one matrix in groups of ``group_size``.
        """
        tensors = pack_gptq(q, bits=bits, checkpoint_format=checkpoint_format)
        if q.codes.dim() != 2:
            raise ValueError(f"q.codes must have shape (out, in), got {tuple(q.codes.shape)}")
        out_features, in_features = q.codes.shape
        # made without memory: the buffers are the tensors at hand
        with torch.device("meta"):
            layer = cls(in_features, out_features, bias is not None, bits=bits, group_size=group_size,
                        checkpoint_format=checkpoint_format)
        if tensors["scales"].shape != layer.scales.shape:
            raise ValueError(f"q.scales must have shape {tuple(layer.scales.mT.shape)} with group_size={group_size}, "
                             f"got {tuple(q.scales.shape)}")
        if bias is not None:
            if tuple(bias.shape) != (out_features,):
                raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}")
            tensors["bias"] = bias.detach().clone()
        for name, value in tensors.items():
            setattr(layer, name, value)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return dequant_linear(x, self.qweight, self.scales, self.qzeros, self.g_idx, self.bias, bits=self.bits,
                              group_size=self.group_size, checkpoint_format=self.checkpoint_format)

    def dequantize(self) -> Tensor:
        """The weight ``(out, in)`` that the buffers stand for, in float32."""
        size = self.in_features if self.group_size == -1 else self.group_size
        return dense_weight(torch.float32, self.qweight, self.scales, self.qzeros, self.g_idx, self.in_features,
                            self.bits, size, self.checkpoint_format == "gptq").mT.contiguous()  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """:meth:`dequantize` in the dtype of the scales, computed anew each time: for code that reads its dtype."""
        return self.dequantize().to(self.scales.dtype)

    def extra_repr(self) -> str:
        version = "" if self.checkpoint_format == "gptq" else f", checkpoint_format={self.checkpoint_format!r}"
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"bits={self.bits}, group_size={self.group_size}{version}")
