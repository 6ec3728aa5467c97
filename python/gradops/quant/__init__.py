"""Weight quantisation with second-order compensation. `reference` holds the same functions in plain PyTorch."""
from . import reference

__all__ = ["reference"]
