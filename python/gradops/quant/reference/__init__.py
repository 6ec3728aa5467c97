"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .columns import gptq_quantize, rtn_quantize
from .pack import pack_gptq, unpack_gptq

__all__ = ["gptq_quantize", "pack_gptq", "rtn_quantize", "unpack_gptq"]
