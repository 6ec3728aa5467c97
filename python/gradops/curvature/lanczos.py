"""Eigenvalues and spectral densities of symmetric matrices that are known by their products."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_count
from ._trees import Tree, template
from ._vectors import flat, gaussian, unflat


class LanczosResult(NamedTuple):
    """Of `lanczos`: `eigenvalues` (k,), rising, and `residuals` (k,), in float64: an eigenvalue of the matrix lies
    within residuals[i] of eigenvalues[i], up to the rounding of the products. `vectors`, if asked for, has the
    eigenvectors along a first axis of every leaf."""

    eigenvalues: Tensor
    residuals: Tensor
    vectors: Any


class SpectralDensity(NamedTuple):
    """Of `slq_density`: `density` at `grid`, and what it is made of, the `nodes` and `weights` of each start
    (n_vectors, k); all in float64."""

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor


def lanczos(matvec: Callable[[Any], Any], k: int, *, like: Any = None, generator: torch.Generator | None = None,
            vectors: bool = False) -> LanczosResult:
    r"""Eigenvalue estimates of a symmetric matrix from k of its products, extreme ones first to be right.

    .. math:: A Q = Q T + \beta_k q_k e_k^\top, \qquad T s = \theta s, \qquad
              \min_i |\lambda_i - \theta| \le \beta_k |s_k|

    Args:
        matvec: v -> A v, on tensors or pytrees of them; what :func:`gradops.curvature.linearize_grad` returns fits.
        k: steps, at most the dimension n.
        like: a tensor or pytree with the shapes and dtypes of v; by default the ``grad`` of `matvec`.
        generator: for the start, a Gaussian vector, on any device.
        vectors: return the Ritz vectors too.

    Returns:
        A `LanczosResult` of k estimates; fewer, all exact, if the start spans a smaller invariant space (an eigenvalue
        is found once, whatever its multiplicity).

    The basis is orthogonalised twice against all of itself, in the dtype of the vectors, and kept: k n numbers. Waits
    for the device once a step. Costs k products and :math:`4 k^2 n` multiply-adds.

    Source: G. Golub, C. Van Loan, Matrix Computations, chapter 10.

    Example:
        >>> import torch
        >>> from gradops.curvature import lanczos
        >>> d = torch.arange(1.0, 101.0, dtype=torch.float64)
        >>> top = lanczos(lambda v: d * v, 60, like=d, generator=torch.Generator().manual_seed(0))
        >>> abs(float(top.eigenvalues[-1]) - 100) < 1e-6
        True
    """
    tree = template(matvec, like, "lanczos")
    check_count(k, "k")
    values, s, beta, basis = _tridiagonal(matvec, k, tree, gaussian(tree, generator))
    found = None
    if vectors:
        found = unflat(s.mT.to(basis) @ basis, tree, stacked=True)
    return LanczosResult(values, (beta * s[-1]).abs(), found)


def slq_density(matvec: Callable[[Any], Any], k: int = 64, n_vectors: int = 8, *, like: Any = None,
                grid: Tensor | int = 1024, sigma: float | None = None,
                generator: torch.Generator | None = None) -> SpectralDensity:
    r"""The density of the eigenvalues of a symmetric matrix, by stochastic Lanczos quadrature.

    .. math:: \phi(t) = \frac1n \sum_i g_\sigma(t - \lambda_i) \approx
              \frac1m \sum_{l=1}^m \sum_{i=1}^k \tau_i^{(l)} g_\sigma(t - \theta_i^{(l)}), \qquad
              \tau_i^{(l)} = (e_1^\top s_i^{(l)})^2

    with the eigenpairs :math:`(\theta, s)` of the tridiagonal matrix of each of m Lanczos runs, and a Gaussian
    :math:`g_\sigma`. The density integrates to 1.

    Args:
        matvec, like, generator: as of :func:`lanczos`.
        k: Lanczos steps of a run, cut to n.
        n_vectors: m, the number of runs.
        grid: where to evaluate it, a tensor of one dimension; or how many points, evenly from 4 sigma below the least
            node to 4 sigma above the largest.
        sigma: the width, by default a hundredth of the range of the nodes.

    Costs ``k * n_vectors`` products. Deterministic under a generator.

    Source: Y. Saad, L. Lin, C. Yang, arXiv 1308.5467; B. Ghorbani, S. Krishnan, Y. Xiao, arXiv 1901.10159.

    Example:
        >>> import torch
        >>> from gradops.curvature import slq_density
        >>> d = torch.linspace(0, 1, 50)
        >>> out = slq_density(lambda v: d * v, 20, 4, like=d, sigma=0.05)
        >>> bool((torch.trapezoid(out.density, out.grid) - 1).abs() < 1e-3)
        True
    """
    tree = template(matvec, like, "slq_density")
    check_count(k, "k")
    check_count(n_vectors, "n_vectors")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be > 0, got {sigma!r}")
    k = min(k, sum(t.numel() for t in tree.tensors))
    # A run that ends early fills up with its first node, at weight 0.
    nodes, weights = torch.empty(2, n_vectors, k, dtype=torch.float64, device="cpu")
    for i in range(n_vectors):
        values, s, _, _ = _tridiagonal(matvec, k, tree, gaussian(tree, generator))
        nodes[i], weights[i] = values[0], 0
        nodes[i, : len(values)], weights[i, : len(values)] = values, s[0].square()
    if sigma is None:
        width = float(nodes.max() - nodes.min())
        sigma = width / 100 if width > 0 else max(1e-2 * float(nodes.abs().max()), 1e-12)
    if isinstance(grid, Tensor):
        if grid.dim() != 1:
            raise ValueError(f"grid must have one dimension, got shape {tuple(grid.shape)}")
        points = grid.detach().double().cpu()
    else:
        check_count(grid, "grid")
        points = torch.linspace(float(nodes.min()) - 4 * sigma, float(nodes.max()) + 4 * sigma, grid,
                                dtype=torch.float64, device="cpu")
    bumps = (-0.5 * ((points[:, None] - nodes.flatten()) / sigma) ** 2).exp() / (sigma * math.sqrt(2 * math.pi))
    return SpectralDensity(points, bumps @ weights.flatten() / n_vectors, nodes, weights)


def _tridiagonal(
    matvec: Callable[[Any], Any], k: int, tree: Tree, start: Tensor
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Eigenvalues and eigenvectors of T in float64 on the CPU, the last beta, and the basis (steps, n)."""
    n = start.numel()
    if k > n:
        raise ValueError(f"k must be at most the dimension {n}, got {k}")
    basis = start.new_empty(k, n)
    basis[0] = start / torch.linalg.vector_norm(start)
    alphas: list[float] = []
    betas: list[float] = []
    scale, beta = 0.0, 0.0
    for j in range(k):
        w = flat(matvec(unflat(basis[j], tree)), tree)
        norm = float(torch.linalg.vector_norm(w))
        scale = max(scale, norm)
        if not math.isfinite(norm):
            raise ValueError(f"matvec returned values that are not finite, at step {j}")
        known = basis[: j + 1]
        first = known @ w
        alphas.append(float(first[-1]))
        w = w - first @ known
        w -= (known @ w) @ known  # once more: after the first time rounding is left
        beta = float(torch.linalg.vector_norm(w))
        if j + 1 == k:
            break
        if beta <= scale * torch.finfo(w.dtype).eps * 100:  # the space is invariant, up to rounding
            break
        betas.append(beta)
        basis[j + 1] = w / beta
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64, device="cpu"))
    if betas:
        off = torch.diag(torch.tensor(betas, dtype=torch.float64, device="cpu"), 1)
        T = T + off + off.mT
    values, s = torch.linalg.eigh(T)
    return values, s, beta, basis[: len(alphas)]
