"""The truncated pseudoinverse of a wide (or tall) matrix, applied to a vector."""
import torch
from torch import Tensor

from .._checks import check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative
from ._blocks import Blocks, check_blocks, check_rows
from ._spectrum import check_filter, factors, gram_suffices
from .gram import gram
from .jt_apply import jt_apply
from .spectral_solve import spectral_solve

METHODS = ("auto", "gram", "qr", "svd", "randomized")
_OVERSAMPLING, _ITERATIONS = 10, 2  # of the randomized method


@allow_in_graph
def pinv_apply(J: Blocks, r: Tensor, *, k: int | None = None, rtol: float = 1e-3,
               method: str = "auto") -> Tensor | list[Tensor]:
    r"""Least squares of least norm through the larger singular values.

    .. math:: d = \sum_{i < k,\ \sigma_i > \mathrm{rtol}\, \sigma_0} v_i \frac{u_i^\top r}{\sigma_i}, \qquad
              J = \sum_i \sigma_i u_i v_i^\top, \quad \sigma_0 \geq \sigma_1 \geq \dots

    ``method`` is how the u and :math:`\sigma` are found; :math:`d = J^\top w` with
    :math:`w = \sum u_i\, \sigma_i^{-2}\, u_i^\top r` in all of them.

    - ``"gram"``: eigenvectors of :math:`J J^\top` in float64, or of :math:`J^\top J` where P < B. It squares the
      condition number: relative error about :math:`10^{-16} (\sigma_0 / \sigma)^2`, on top of what rounding the
      result to the dtype of ``J`` costs.
    - ``"qr"``: QR of :math:`J^\top` and the SVD of its factor R, in float64; error about
      :math:`10^{-16}\, \sigma_0 / \sigma`. Several times slower, and a copy of the block at hand.
    - ``"svd"``: ``torch.linalg.svd`` in float64, after concatenation. Slowest.
    - ``"randomized"``: the Gram method in a random subspace of k + 10 dimensions after two power iterations. Pays for
      k far below B; it finds the leading singular vectors as well as the spectrum falls off after them, and those
      below about 1e-3 of the largest not at all in float32. The random numbers are always the same.
    - ``"auto"``: Gram where rtol is at least 1e-2 (float64) or 1e-7 (other dtypes), else QR, so that the relative
      error is at most :math:`8\, \epsilon_{32}\, \sigma_0 / \sigma` for float32, where :math:`\sigma` is the smallest
      one kept, and 1e-9 for float64 down to rtol = 1e-6. No SVD in float32 is as accurate.

    Args:
        J: ``(..., B, P)``, or a list of blocks of its columns ``(..., B, P_l)``; float64, float32, bfloat16 or float16.
        r: ``(..., B)``; any of these dtypes.
        k: use at most that many singular values; ``None`` for all.
        rtol: relative to the largest singular value, in [0, 1).
        method: as above.

    Returns:
        ``(..., P)`` of the dtype of ``J``, or a list of them, block by block. A zero J gives zero; an item with a NaN
        or infinity gives NaN and does not affect others.

    Raises:
        TypeError: ``J`` or ``r`` is no dense real floating-point tensor.
        ValueError: a shape or a device does not fit, an option is out of its range, or ``"randomized"`` has no k.
        RuntimeError: a derivative is asked for.

    :math:`O(\min(B, P)^2 \max(B, P))`. Squares must not leave the range of float64. On CUDA it is as asynchronous as
    ``torch.linalg.eigh``, or ``svd``, which read whether they have converged.

    Example:
        >>> import torch
        >>> from gradops.linalg import pinv_apply
        >>> pinv_apply(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1e-5, 0.0]]), torch.ones(2))
        tensor([0.5000, 0.0000, 0.0000])
    """
    blocks = check_blocks(J, "J")
    check_rows(r, "r", blocks)
    check_filter(k, rtol)
    check_one_of(method, "method", METHODS)
    if method == "randomized" and k is None:
        raise ValueError("k must be given for method='randomized', got None")
    refuse_derivative("pinv_apply", r=r, **{f"J[{i}]" if len(blocks) > 1 else "J": x for i, x in enumerate(blocks)})
    if method == "auto":
        method = "gram" if gram_suffices(rtol, any(x.dtype == torch.float64 for x in blocks)) else "qr"
    r = r.double()
    out: Tensor | list[Tensor]
    if method == "gram" and sum(x.shape[-1] for x in blocks) < r.shape[-1]:
        out = _tall(blocks, r, k, rtol)
    elif method == "gram":
        out = jt_apply(blocks, spectral_solve(gram(blocks), r, k=k, rtol=rtol, atol=0.0)[0])
    elif method == "randomized" and k is not None:
        out = jt_apply(blocks, _randomized(blocks, r, k, rtol))
    else:
        out = jt_apply(blocks, _by_svd(_triangle(blocks) if method == "qr" else torch.cat(blocks, -1).double().mT,
                                       r, k, rtol))
    return out[0] if isinstance(J, Tensor) else out


def _tall(blocks: list[Tensor], r: Tensor, k: int | None, rtol: float) -> list[Tensor]:
    """P < B: the Gram matrix of the columns of J and r holds both J^T J and J^T r, with products in float64."""
    columns = torch.cat([*blocks, r[..., None]], -1)
    g = gram(columns.mT)
    d = spectral_solve(g[..., :-1, :-1], g[..., :-1, -1], k=k, rtol=rtol, atol=0.0)[0]
    parts = d.split([x.shape[-1] for x in blocks], -1)
    return [d.to(x.dtype) for d, x in zip(parts, blocks, strict=True)]


def _triangle(blocks: list[Tensor]) -> Tensor:
    """R of J^T = Q R: of the blocks one by one, and then of their triangles."""
    triangles = [torch.linalg.qr(x.double().mT, mode="r").R for x in blocks]
    return triangles[0] if len(triangles) == 1 else torch.linalg.qr(torch.cat(triangles, -2), mode="r").R


def _by_svd(Jt: Tensor, r: Tensor, k: int | None, rtol: float) -> Tensor:
    """w, through the SVD of J^T, or of a matrix with the same right singular vectors and singular values."""
    if Jt.numel() == 0:
        return torch.zeros_like(r)
    finite = (Jt.abs().amax((-2, -1)) < torch.inf)[..., None]  # else the SVD may fail for the whole batch
    _, sigma, vh = torch.linalg.svd(torch.where(finite[..., None], Jt, 0), full_matrices=False)
    _, factor, _ = factors(torch, sigma**2, -1 if k is None else k, rtol, 0.0, "hard", 0.0, 1.0)
    w = vh.mT @ (factor[..., None] * (vh @ r[..., None]))
    return torch.where(finite, w[..., 0], torch.nan)


def _randomized(blocks: list[Tensor], r: Tensor, k: int, rtol: float) -> Tensor:
    """w within the span of J (J^T J)^iterations times a random matrix. Halko, Martinsson, Tropp, arXiv 0909.4061."""
    rows, device = r.shape[-1], r.device
    size = min(k + _OVERSAMPLING, rows, sum(x.shape[-1] for x in blocks))
    generator = torch.Generator(device).manual_seed(0)
    wide = [x if x.dtype.itemsize > 2 else x.float() for x in blocks]

    def image(right: list[Tensor]) -> Tensor:
        images = [(x @ y).double() for x, y in zip(wide, right, strict=True)]
        return torch.linalg.qr(sum(images[1:], images[0])).Q

    basis = image([torch.randn(x.shape[-1], size, generator=generator, device=device, dtype=x.dtype) for x in wide])
    for _ in range(_ITERATIONS):
        basis = image([x.mT @ basis.to(x.dtype) for x in wide])
    g = gram([basis.mT.to(x.dtype) @ x for x in wide])
    w = spectral_solve(g, (basis.mT @ r[..., None])[..., 0], k=k, rtol=rtol, atol=0.0)[0]
    return (basis @ w[..., None])[..., 0]
