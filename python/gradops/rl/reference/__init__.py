"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .allocation import allocate_rollouts, curriculum_probs, curriculum_update
from .capo import capo_curvature, capo_curvature_sgd, capo_mask, capo_update_moments_
from .groups import adora_weights, group_advantages, group_index, group_top_k_mask, segment_stats, trajectory_advantages
from .linear import linear_logprob, one_token_rollout_loss
from .logp import selective_log_softmax, top_p_keep
from .loss import policy_loss, replay_routing, rollout_correction
from .scans import discounted_returns, gae, lambda_returns, vtrace
from .segments import segment_trajectories
from .selection import permutation_weights, plackett_luce_logprob, plackett_luce_sample

__all__ = [
    "adora_weights", "allocate_rollouts", "capo_curvature", "capo_curvature_sgd", "capo_mask",
    "capo_update_moments_", "curriculum_probs", "curriculum_update", "discounted_returns", "gae",
    "group_advantages", "group_index", "group_top_k_mask", "lambda_returns", "linear_logprob",
    "one_token_rollout_loss", "permutation_weights", "plackett_luce_logprob", "plackett_luce_sample",
    "policy_loss", "replay_routing", "rollout_correction", "segment_stats", "segment_trajectories",
    "selective_log_softmax", "top_p_keep", "trajectory_advantages", "vtrace",
]  # fmt: skip
