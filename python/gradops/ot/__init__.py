"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .router import RouterInfo, router

__all__ = [
    "RouterInfo", "reference", "router",
]  # fmt: skip
