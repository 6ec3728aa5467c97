"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .capo import capo_curvature, capo_curvature_sgd, capo_mask, capo_update_moments_
from .selection import permutation_weights, plackett_luce_logprob, plackett_luce_sample

__all__ = [
    "capo_curvature",
    "capo_curvature_sgd",
    "capo_mask",
    "capo_update_moments_",
    "permutation_weights",
    "plackett_luce_logprob",
    "plackett_luce_sample",
]
