"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from ._policy_kinds import PolicyStats
from .policy_loss import policy_loss

__all__ = ["PolicyStats", "policy_loss", "reference"]
