"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .semidual import semidual
from .sparse_plan import SparsePlan

__all__ = [
    "SparsePlan", "reference", "semidual",
]  # fmt: skip
