"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .result import OTResult, Potentials
from .semidual import semidual
from .solve import solve
from .sparse_plan import SparsePlan

__all__ = [
    "OTResult", "Potentials", "SparsePlan", "reference", "semidual", "solve",
]  # fmt: skip
