"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from ._policy_kinds import PolicyStats
from .policy_loss import policy_loss
from .replay_routing import replay_routing
from .rollout_correction import rollout_correction

__all__ = ["PolicyStats", "policy_loss", "reference", "replay_routing", "rollout_correction"]
