"""Plain PyTorch twins of this family's ops: slow, any dtype, the yardstick of every test."""
from .gram import gram, jt_apply, pinv_apply, spectral_solve
from .outer import (
    gram_affine,
    gram_conv2d,
    gram_embedding,
    gram_outer,
    outer_jvp,
    outer_vjp,
    per_sample_stats,
)
from .polar import inv_sqrt, newton_schulz, nuclear_scale, one_sided_polar, polar, row_norm

__all__ = [
    "gram", "gram_affine", "gram_conv2d", "gram_embedding", "gram_outer", "inv_sqrt", "jt_apply", "newton_schulz",
    "nuclear_scale", "one_sided_polar", "outer_jvp", "outer_vjp", "per_sample_stats", "pinv_apply", "polar", "row_norm",
    "spectral_solve",
]  # fmt: skip
