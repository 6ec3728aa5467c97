"""Hessian-vector products of whole models, and what is made of them: spectra, traces, policy-gradient Hessians."""
from .cross_entropy import cross_entropy
from .ggn import fvp, ggnvp
from .hutchinson import DiagonalEstimate, TraceEstimate, hutchinson_diag, hutchinson_trace
from .hvp import LinearizedGrad, grad_and_hvp, hvp, linearize_grad
from .kernels import second_order_kernels
from .lanczos import LanczosResult, SpectralDensity, lanczos, slq_density
from .layer_norm import layer_norm, rms_norm
from .linear_ce_ggnvp import linear_ce_ggnvp
from .linear_cross_entropy import linear_cross_entropy
from .operators import as_linear_operator
from .policy import pg_hvp
from .rope import rope
from .scaled_dot_product_attention import scaled_dot_product_attention
from .softmax_ce_hvp import softmax_ce_hvp
from .swiglu import swiglu

__all__ = [
    "DiagonalEstimate", "LanczosResult", "LinearizedGrad", "SpectralDensity", "TraceEstimate", "as_linear_operator",
    "cross_entropy", "fvp", "ggnvp", "grad_and_hvp", "hutchinson_diag", "hutchinson_trace", "hvp", "lanczos",
    "layer_norm", "linear_ce_ggnvp", "linear_cross_entropy", "linearize_grad", "pg_hvp", "rms_norm", "rope",
    "scaled_dot_product_attention", "second_order_kernels", "slq_density", "softmax_ce_hvp", "swiglu",
]  # fmt: skip
