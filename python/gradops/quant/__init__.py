"""Weight quantisation with second-order compensation. `reference` holds the same functions in plain PyTorch."""
from . import reference
from ._columns import QuantizedWeight
from .gptq_quantize import gptq_quantize, rtn_quantize

__all__ = ["QuantizedWeight", "gptq_quantize", "reference", "rtn_quantize"]
