"""Plain PyTorch twins of this family's ops: slow, any dtype, the yardstick of every test."""
from .gram import gram, jt_apply, pinv_apply, spectral_solve
from .polar import inv_sqrt, newton_schulz, nuclear_scale, one_sided_polar, polar, row_norm

__all__ = [
    "gram", "inv_sqrt", "jt_apply", "newton_schulz", "nuclear_scale", "one_sided_polar", "pinv_apply", "polar",
    "row_norm", "spectral_solve",
]  # fmt: skip
