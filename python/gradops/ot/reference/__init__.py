"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .projection import sparse_simplex_projection
from .semidual import semidual

__all__ = [
    "semidual", "sparse_simplex_projection",
]  # fmt: skip
