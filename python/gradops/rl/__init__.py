"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .capo_curvature import capo_curvature, capo_curvature_sgd
from .capo_mask import capo_mask
from .capo_update_moments import capo_update_moments_
from .permutation_weights import permutation_weights
from .plackett_luce_logprob import plackett_luce_logprob
from .plackett_luce_sample import plackett_luce_sample

__all__ = [
    "capo_curvature",
    "capo_curvature_sgd",
    "capo_mask",
    "capo_update_moments_",
    "permutation_weights",
    "plackett_luce_logprob",
    "plackett_luce_sample",
    "reference",
]
