"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .columns import gptq_quantize, rtn_quantize
from .hessian import gptaq_cross_update_, hessian_factor, hessian_update_
from .linear import dequant_linear
from .pack import pack_fp4, pack_gptq, unpack_fp4, unpack_gptq

__all__ = [
    "dequant_linear", "gptaq_cross_update_", "gptq_quantize", "hessian_factor", "hessian_update_", "pack_fp4",
    "pack_gptq", "rtn_quantize", "unpack_fp4", "unpack_gptq",
]  # fmt: skip
