"""Weight quantisation with second-order compensation. `reference` holds the same functions in plain PyTorch."""
from . import reference
from ._columns import QuantizedWeight
from .gptq_pack import pack_gptq, unpack_gptq
from .gptq_quantize import gptq_quantize, rtn_quantize

__all__ = ["QuantizedWeight", "gptq_quantize", "pack_gptq", "reference", "rtn_quantize", "unpack_gptq"]
