"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .pot import smooth_ot_semi_dual
from .result import OTResult, Potentials
from .semidual import semidual
from .solve import solve
from .sparse_plan import SparsePlan

__all__ = [
    "OTResult", "Potentials", "SparsePlan", "reference", "semidual", "smooth_ot_semi_dual", "solve",
]  # fmt: skip
