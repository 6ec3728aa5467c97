"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from ._policy_kinds import PolicyStats
from .adora_weights import adora_weights
from .allocate_rollouts import allocate_rollouts
from .capo_curvature import capo_curvature, capo_curvature_sgd
from .capo_mask import capo_mask
from .capo_update_moments import capo_update_moments_
from .curriculum import curriculum_probs, curriculum_update
from .discounted_returns import discounted_returns
from .gae import gae
from .group_advantages import group_advantages, trajectory_advantages
from .group_index import group_index
from .group_top_k_mask import group_top_k_mask
from .lambda_returns import lambda_returns
from .linear_logprob import linear_logprob
from .one_token_rollout import one_token_rollout_loss
from .permutation_weights import permutation_weights
from .plackett_luce_logprob import plackett_luce_logprob
from .plackett_luce_sample import plackett_luce_sample
from .policy_loss import policy_loss
from .replay_routing import replay_routing
from .rollout_correction import rollout_correction
from .segment_stats import SegmentStats, all_reduce_stats, merge_stats, segment_stats
from .segment_trajectories import Segments, segment_trajectories
from .selective_log_softmax import selective_log_softmax
from .top_p_keep import top_p_keep
from .vtrace import vtrace

__all__ = [
    "PolicyStats", "SegmentStats", "Segments", "adora_weights", "all_reduce_stats", "allocate_rollouts",
    "capo_curvature", "capo_curvature_sgd", "capo_mask", "capo_update_moments_", "curriculum_probs",
    "curriculum_update", "discounted_returns", "gae", "group_advantages", "group_index", "group_top_k_mask",
    "lambda_returns", "linear_logprob", "merge_stats", "one_token_rollout_loss", "permutation_weights",
    "plackett_luce_logprob", "plackett_luce_sample", "policy_loss", "reference", "replay_routing",
    "rollout_correction", "segment_stats", "segment_trajectories", "selective_log_softmax", "top_p_keep",
    "trajectory_advantages", "vtrace",
]  # fmt: skip
