"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .allocate_rollouts import allocate_rollouts
from .curriculum import curriculum_probs, curriculum_update
from .discounted_returns import discounted_returns
from .gae import gae
from .lambda_returns import lambda_returns
from .segment_trajectories import Segments, segment_trajectories
from .vtrace import vtrace

__all__ = [
    "Segments",
    "allocate_rollouts",
    "curriculum_probs",
    "curriculum_update",
    "discounted_returns",
    "gae",
    "lambda_returns",
    "reference",
    "segment_trajectories",
    "vtrace",
]
