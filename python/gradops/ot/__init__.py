"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .router import RouterInfo, router
from .semidual import semidual
from .sparse_plan import SparsePlan
from .sparse_simplex_projection import sparse_simplex_projection

__all__ = [
    "RouterInfo", "SparsePlan", "reference", "router", "semidual", "sparse_simplex_projection",
]  # fmt: skip
