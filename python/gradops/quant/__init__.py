"""Weight quantisation with second-order compensation. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .hessian_factor import hessian_factor
from .hessian_update import gptaq_cross_update_, hessian_update_

__all__ = ["gptaq_cross_update_", "hessian_factor", "hessian_update_", "reference"]
