"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .loss import policy_loss, replay_routing, rollout_correction

__all__ = ["policy_loss", "replay_routing", "rollout_correction"]
