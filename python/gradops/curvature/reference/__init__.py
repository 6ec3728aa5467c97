"""Plain PyTorch twins of this family's kernels: any dtype, any order of derivatives, the yardstick of every test."""
from .cross_entropy import cross_entropy, softmax_ce_hvp
from .linear_cross_entropy import linear_ce_ggnvp, linear_cross_entropy

__all__ = [
    "cross_entropy", "linear_ce_ggnvp", "linear_cross_entropy", "softmax_ce_hvp",
]  # fmt: skip
