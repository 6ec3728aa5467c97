"""Optimizers on the kernels of `gradops.linalg`: every shape one batched call, no host sync, float32 state."""

from .adamw import AdamW
from .hybrid import HybridPolarGradM
from .layouts import to_matrices
from .mixed import SymmetryOptimizer
from .muon import Muon
from .one_sided import LeftPolarGradM, RightPolarGradM
from .polargrad import PolarGrad
from .row_norm import RowNormM
from .symmetry import symmetry_param_groups

__all__ = [
    "AdamW",
    "HybridPolarGradM",
    "LeftPolarGradM",
    "Muon",
    "PolarGrad",
    "RightPolarGradM",
    "RowNormM",
    "SymmetryOptimizer",
    "symmetry_param_groups",
    "to_matrices",
]
