"""Weight quantisation with second-order compensation. `reference` holds the same functions in plain PyTorch."""
from . import reference
from ._columns import QuantizedWeight
from ._report import ModuleResult, QuantizeReport
from .checkpoint import load_quantized, save_quantized
from .config import QuantizeConfig
from .dequant_linear import dequant_linear
from .fp4_pack import pack_fp4, unpack_fp4
from .gptq_pack import pack_gptq, unpack_gptq
from .gptq_quantize import gptq_quantize, rtn_quantize
from .hessian_factor import hessian_factor
from .hessian_update import gptaq_cross_update_, hessian_update_
from .quantize_model import quantize_model
from .quantized_linear import QuantizedLinear

__all__ = [
    "ModuleResult", "QuantizeConfig", "QuantizeReport", "QuantizedLinear", "QuantizedWeight", "dequant_linear",
    "gptaq_cross_update_", "gptq_quantize", "hessian_factor", "hessian_update_", "load_quantized", "pack_fp4",
    "pack_gptq", "quantize_model", "reference", "rtn_quantize", "save_quantized", "unpack_fp4", "unpack_gptq",
]  # fmt: skip
