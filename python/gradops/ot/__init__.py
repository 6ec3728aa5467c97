"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .dense_plan import DensePlan
from .entropic import entropic
from .semidual import semidual
from .sparse_plan import SparsePlan

__all__ = [
    "DensePlan", "SparsePlan", "entropic", "reference", "semidual",
]  # fmt: skip
