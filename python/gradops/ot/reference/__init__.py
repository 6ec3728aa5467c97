"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .entropic import entropic
from .projection import sparse_simplex_projection
from .router import router
from .semidual import semidual
from .solve import solve

__all__ = [
    "entropic", "router", "semidual", "solve", "sparse_simplex_projection",
]  # fmt: skip
