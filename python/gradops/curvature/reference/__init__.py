"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .attention import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
