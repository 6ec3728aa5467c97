"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .groups import (
    adora_weights,
    group_advantages,
    group_index,
    group_top_k_mask,
    segment_stats,
    trajectory_advantages,
)  # fmt: skip

__all__ = [
    "adora_weights", "group_advantages", "group_index", "group_top_k_mask", "segment_stats", "trajectory_advantages",
]  # fmt: skip
