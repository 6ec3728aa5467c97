"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .columns import gptq_quantize, rtn_quantize

__all__ = ["gptq_quantize", "rtn_quantize"]
