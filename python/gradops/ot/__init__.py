"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .dense_plan import DensePlan
from .entropic import entropic
from .result import OTResult, Potentials
from .semidual import semidual
from .solve import solve
from .sparse_plan import SparsePlan

__all__ = [
    "DensePlan", "OTResult", "Potentials", "SparsePlan", "entropic", "reference", "semidual", "solve",
]  # fmt: skip
