"""Sparse optimal transport. `reference` holds the same functions in plain PyTorch."""
from . import reference

__all__ = [
    "reference",
]  # fmt: skip
