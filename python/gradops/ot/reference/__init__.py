"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .entropic import entropic
from .projection import sparse_simplex_projection
from .semidual import semidual
from .solve import solve

__all__ = [
    "entropic", "semidual", "solve", "sparse_simplex_projection",
]  # fmt: skip
