"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .dense_plan import DensePlan
from .entropic import entropic
from .pot import smooth_ot_semi_dual
from .result import OTResult, Potentials
from .router import RouterInfo, router
from .semidual import semidual
from .solve import solve
from .sparse_plan import SparsePlan
from .sparse_simplex_projection import sparse_simplex_projection

__all__ = [
    "DensePlan", "OTResult", "Potentials", "RouterInfo", "SparsePlan", "entropic", "reference", "router",
    "semidual", "smooth_ot_semi_dual", "solve", "sparse_simplex_projection",
]  # fmt: skip
