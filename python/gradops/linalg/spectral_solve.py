"""Solves through the eigenvectors of a Gram matrix, with a filter on its spectrum."""
from math import isfinite

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_matrix
from .._compiler import allow_in_graph
from .._op import _library, refuse_derivative, register
from ._spectrum import check_filter, factors

_library.define("spectral_solve(Tensor G, Tensor r, int k, float rtol, float atol, str filter, float damping, "
                "float power) -> (Tensor, Tensor, Tensor)")


@torch.library.impl(_library, "spectral_solve", "CompositeExplicitAutograd")
def _spectral_solve(G: Tensor, r: Tensor, k: int, rtol: float, atol: float, filter: str, damping: float,
                    power: float) -> tuple[Tensor, Tensor, Tensor]:
    G, r = G.double(), r.double()
    if G.numel() == 0:
        return torch.zeros_like(r), torch.zeros_like(r), torch.zeros(r.shape[:-1], dtype=torch.int64, device=G.device)
    # eigh may fail for the whole batch where one matrix is not finite. On the CPU it takes no time to see that all are.
    finite = None
    if not (G.is_cpu and isfinite(float(G.sum() + r.sum()))):
        finite = (G.abs().amax((-2, -1)) < torch.inf) & (r.abs().amax(-1) < torch.inf)
        G, r = torch.where(finite[..., None, None], G, 0), torch.where(finite[..., None], r, 0)
    values, q = torch.linalg.eigh(G)
    sigma, factor, kept = factors(torch, values.flip(-1).clamp_min_(0), k, rtol, atol, filter, damping, power)
    w, rank = _times(q, factor.flip(-1) * _times(q.mT, r)), kept.sum(-1)
    if finite is None:
        return w, sigma, rank
    nan = torch.where(finite, 0.0, torch.nan)[..., None]
    return w + nan, sigma + nan, torch.where(finite, rank, -1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return matrix @ vector if vector.dim() == 1 else (matrix @ vector[..., None])[..., 0]


def _fake(G: Tensor, r: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    w = r.new_empty(r.shape, dtype=torch.float64)
    return w, torch.empty_like(w), r.new_empty(r.shape[:-1], dtype=torch.int64)


_op = register("spectral_solve", fake=_fake)


@allow_in_graph
def spectral_solve(G: Tensor, r: Tensor, *, k: int | None = None, rtol: float = 1e-3, atol: float = 1e-10,
                   filter: str = "hard", damping: float = 0.0, power: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    r"""Applies a filtered inverse of a symmetric positive semidefinite matrix to a vector.

    With :math:`G = J J^\top = U \operatorname{diag}(\sigma^2) U^\top` and :math:`\sigma_0 \geq \sigma_1 \geq \dots`

    .. math:: w = U \operatorname{diag}(\varphi) U^\top r, \qquad
              \varphi_i = f_i\, \frac{\sigma_i^{1-p}}{\sigma_i^2 + \mu}

    so that by default :math:`J^\top w` is the truncated pseudoinverse of J applied to r. The filter f is, for i < k and
    0 otherwise,

    - ``"hard"`` (Sven): 1 where :math:`\sigma_i > \mathrm{rtol}\, \sigma_0` and :math:`\sigma_i > \mathrm{atol}`,
      else 0;
    - ``"smooth"``: :math:`1 / (1 + (\mathrm{rtol}^2 \sigma_0^2 / \sigma_i^2)^6)` where
      :math:`\sigma_i > \mathrm{atol}`, else 0: one half at the hard filter's cut;
    - ``"tikhonov"``: 1 whatever ``rtol`` and ``atol``; with ``damping`` this is Levenberg-Marquardt's
      :math:`(G + \mu I)^{-1} r`.

    Args:
        G: ``(..., B, B)``, of which the lower triangle is read; float64, float32, bfloat16 or float16. Singular values
            are squared in G: of a float64 G they are known to about 1e-7 of the largest, of a float32 G to about 1e-3.
        r: ``(..., B)``, with the same leading dimensions.
        k: keep at most that many; ``None`` for all.
        rtol: relative to the largest singular value, in [0, 1).
        atol: in the units of :math:`\sigma`.
        filter: ``"hard"``, ``"tikhonov"`` or ``"smooth"``.
        damping: :math:`\mu`, in the units of G.
        power: p: 1 for the pseudoinverse, 1/2 for the half-inverse gradient, 0 for the whitened gradient.

    Returns:
        ``w`` ``(..., B)`` and ``sigma`` ``(..., B)`` in falling order, float64, and ``rank`` ``(...)``, int64: how many
        singular values are above the hard filter's cut, whatever the filter. G = 0 gives w = 0. An item with a NaN or
        infinity has w and sigma NaN and rank -1; others are not affected.

    Raises:
        TypeError: ``G`` or ``r`` is no dense real floating-point tensor.
        ValueError: a shape does not fit, or an option is out of its range.
        RuntimeError: a derivative is asked for.

    In float64 by ``torch.linalg.eigh``, :math:`O(B^3)`. On CUDA nothing here waits for the device, except eigh itself,
    which reads whether it has converged. Sources: Sven (truncation by rtol and k); Schnell and Thuerey,
    arXiv 2203.10131 (half-inverse gradients); the smooth filter is NetKet's ``pinv_smooth`` with its
    ``rtol_smooth`` = ``rtol**2``.

    Example:
        >>> import torch
        >>> from gradops.linalg import spectral_solve
        >>> G = torch.diag(torch.tensor([4.0, 1.0, 1e-8], dtype=torch.float64))
        >>> w, sigma, rank = spectral_solve(G, torch.ones(3))
        >>> w, rank
        (tensor([0.2500, 1.0000, 0.0000], dtype=torch.float64), tensor(2))
    """
    check_matrix(G, "G")
    check_floating(r, "r")
    if G.shape[-1] != G.shape[-2]:
        raise ValueError(f"G must be square (..., B, B), got shape {tuple(G.shape)}")
    if r.shape != G.shape[:-1]:
        raise ValueError(f"r must have the shape of G less the last dimension, {tuple(G.shape[:-1])}, "
                         f"got {tuple(r.shape)}")
    check_device(r, "r", G, "G")
    check_filter(k, rtol, atol, filter, damping, power)
    refuse_derivative("spectral_solve", G=G, r=r)
    return _op(G, r, -1 if k is None else k, float(rtol), float(atol), filter, float(damping), float(power))
