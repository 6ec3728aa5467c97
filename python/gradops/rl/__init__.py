"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .allocate_rollouts import allocate_rollouts
from .curriculum import curriculum_probs, curriculum_update
from .discounted_returns import discounted_returns
from .gae import gae
from .lambda_returns import lambda_returns
from .linear_logprob import linear_logprob
from .one_token_rollout import one_token_rollout_loss
from .segment_trajectories import Segments, segment_trajectories
from .selective_log_softmax import selective_log_softmax
from .top_p_keep import top_p_keep
from .vtrace import vtrace

__all__ = ["Segments", "allocate_rollouts", "curriculum_probs", "curriculum_update", "discounted_returns", "gae", "lambda_returns", "linear_logprob", "one_token_rollout_loss", "reference", "segment_trajectories", "selective_log_softmax", "top_p_keep", "vtrace"]
