"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .hessian import gptaq_cross_update_, hessian_factor, hessian_update_

__all__ = ["gptaq_cross_update_", "hessian_factor", "hessian_update_"]
