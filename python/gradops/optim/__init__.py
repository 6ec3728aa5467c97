"""Optimizers on the kernels of `gradops.linalg`: every shape one batched call, no host sync, float32 state."""

from .adamw import AdamW
from .capture import capture, per_sample_gram
from .harpg import HARPG
from .hybrid import HybridPolarGradM
from .layouts import to_matrices
from .mixed import SymmetryOptimizer
from .muon import Muon
from .nigt import NPGIGT
from .one_sided import LeftPolarGradM, RightPolarGradM
from .polargrad import PolarGrad
from .row_norm import RowNormM
from .sven import Sven, SvenInfo
from .symmetry import symmetry_param_groups

__all__ = [
    "HARPG",
    "NPGIGT",
    "AdamW",
    "HybridPolarGradM",
    "LeftPolarGradM",
    "Muon",
    "PolarGrad",
    "RightPolarGradM",
    "RowNormM",
    "Sven",
    "SvenInfo",
    "SymmetryOptimizer",
    "capture",
    "per_sample_gram",
    "symmetry_param_groups",
    "to_matrices",
]
