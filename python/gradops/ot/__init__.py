"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .dense_plan import DensePlan
from .entropic import entropic
from .pot import smooth_ot_semi_dual
from .result import OTResult, Potentials
from .semidual import semidual
from .solve import solve
from .sparse_plan import SparsePlan

__all__ = [
    "DensePlan", "OTResult", "Potentials", "SparsePlan", "entropic", "reference", "semidual", "smooth_ot_semi_dual",
    "solve",
]  # fmt: skip
