"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .adora_weights import adora_weights
from .group_advantages import group_advantages, trajectory_advantages
from .group_index import group_index
from .group_top_k_mask import group_top_k_mask
from .segment_stats import SegmentStats, all_reduce_stats, merge_stats, segment_stats

__all__ = [
    "SegmentStats", "adora_weights", "all_reduce_stats", "group_advantages", "group_index", "group_top_k_mask",
    "merge_stats", "reference", "segment_stats", "trajectory_advantages",
]  # fmt: skip
