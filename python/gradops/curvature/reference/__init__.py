"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .cross_entropy import cross_entropy, softmax_ce_hvp
from .layer_norm import layer_norm, rms_norm
from .linear_cross_entropy import linear_ce_ggnvp, linear_cross_entropy
from .rope import rope
from .scaled_dot_product_attention import scaled_dot_product_attention
from .swiglu import swiglu

__all__ = [
    "cross_entropy", "layer_norm", "linear_ce_ggnvp", "linear_cross_entropy", "rms_norm", "rope",
    "scaled_dot_product_attention", "softmax_ce_hvp", "swiglu",
]  # fmt: skip
