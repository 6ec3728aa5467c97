"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .result import OTResult, Potentials
from .router import RouterInfo, router
from .semidual import semidual
from .solve import solve
from .sparse_plan import SparsePlan
from .sparse_simplex_projection import sparse_simplex_projection

__all__ = [
    "OTResult", "Potentials", "RouterInfo", "SparsePlan", "reference", "router", "semidual", "solve",
    "sparse_simplex_projection",
]  # fmt: skip
