"""Plain PyTorch twins of this family's kernels: any dtype, any order of derivatives, the yardstick of every test."""
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "rope", "swiglu",
]  # fmt: skip
