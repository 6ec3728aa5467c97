"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .discounted_returns import discounted_returns
from .gae import gae
from .lambda_returns import lambda_returns
from .vtrace import vtrace

__all__ = [
    "discounted_returns",
    "gae",
    "lambda_returns",
    "reference",
    "vtrace",
]
