"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .attention import scaled_dot_product_attention
from .norms import layer_norm, rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "layer_norm", "rms_norm", "rope", "scaled_dot_product_attention", "swiglu",
]  # fmt: skip
