"""Weight quantisation with second-order compensation. `reference` holds the same functions in plain PyTorch."""
from . import reference
from ._columns import QuantizedWeight
from .dequant_linear import dequant_linear
from .fp4_pack import pack_fp4, unpack_fp4
from .gptq_pack import pack_gptq, unpack_gptq
from .gptq_quantize import gptq_quantize, rtn_quantize
from .hessian_factor import hessian_factor
from .hessian_update import gptaq_cross_update_, hessian_update_
from .quantized_linear import QuantizedLinear

__all__ = [
    "QuantizedLinear", "QuantizedWeight", "dequant_linear", "gptaq_cross_update_", "gptq_quantize",
    "hessian_factor", "hessian_update_", "pack_fp4", "pack_gptq", "reference", "rtn_quantize", "unpack_fp4",
    "unpack_gptq",
]  # fmt: skip
