"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .selective_log_softmax import selective_log_softmax

__all__ = ["reference", "selective_log_softmax"]
