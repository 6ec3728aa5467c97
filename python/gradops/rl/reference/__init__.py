"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .logp import selective_log_softmax, top_p_keep

__all__ = ["selective_log_softmax", "top_p_keep"]
