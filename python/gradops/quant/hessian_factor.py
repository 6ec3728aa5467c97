"""The triangular factor that second-order compensation walks along, by one Cholesky factorisation."""
import torch
from torch import Tensor

from .._checks import check_tensor
from .._compiler import allow_in_graph
from .._op import _library, refuse_derivative, register
from .._precision import matmul_precision
from ._columns import fresh_like, items_together, may_hold
from .gptq_spread import gptq_spread_
from .upper_factor import MOST_COLUMNS, upper_factor

NOT_DEFINITE, NOT_FINITE, UNSEEN = 1, 2, 3  # info

_library.define("hessian_factor(Tensor H, float damp_percent, float damp_auto_increment, bool inverse) "
                "-> (Tensor, Tensor, Tensor)")


@torch.library.impl(_library, "hessian_factor", "CompositeExplicitAutograd")
def _hessian_factor(H: Tensor, damp_percent: float, damp_auto_increment: float,
                    inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    n = H.shape[-1]
    h = H.reshape(H.shape[:-2].numel(), n, n)
    factor = fresh_like(h).zero_()
    if len(h) == 0:
        return _fake(H, damp_percent, damp_auto_increment, inverse)
    step = items_together(h)  # an item of a batch gets the bits that it gets alone
    with matmul_precision("highest"):
        parts = [_factor(x, out, damp_percent, damp_auto_increment, inverse)
                 for x, out in zip(h.split(step), factor.split(step), strict=True)]  # fmt: skip
    damp = torch.cat([part[0] for part in parts])
    info = torch.cat([part[1] for part in parts])
    return factor.view(H.shape), damp.view(H.shape[:-2]), info.view(H.shape[:-2])


def _fake(H: Tensor, damp_percent: float, damp_auto_increment: float, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.empty_like(H, memory_format=torch.contiguous_format),
            H.new_empty(H.shape[:-2], dtype=torch.float64), H.new_empty(H.shape[:-2], dtype=torch.int32))


_op = register("hessian_factor", fake=_fake)


@allow_in_graph
def hessian_factor(H: Tensor, *, damp_percent: float = 0.01, damp_auto_increment: float = 0.0,
                   factor_dtype: torch.dtype | None = None, inverse: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    r"""Factors the damped inverse of each Hessian, in one Cholesky factorisation in place of the usual two.

    .. math:: U^\top U = (H + \lambda I)^{-1}, \qquad U \text{ upper triangular}, \qquad
              \lambda = p\,\frac{1}{N}\sum_i H_{ii}

    :math:`U = R^{-1}` with :math:`H + \lambda I = R R^\top`, :math:`R` upper triangular: the Cholesky factorisation
    from the last column to the first. ``inverse=False`` returns :math:`R` itself, from which the same compensation
    can be had block by block with inverses of diagonal blocks only.

    A batch never fails as a whole: an item without a factor gets the identity, with which compensation moves nothing,
    and ``info`` says why.

    Args:
        H: ``(..., N, N)``, symmetric, as made by :func:`hessian_update_`; float32 or float64. Not modified. Columns
            that never saw an input (``H_ii = 0``) are taken with ``H_ii = 1``, which also counts in the mean, as in
            the GPTQ authors' code.
        damp_percent: :math:`p`, a share of the mean of the diagonal (0.01: the GPTQ authors, llm-compressor;
            GPTQModel takes 0.05).
        damp_auto_increment: added to :math:`p`, up to 1, for items that are not positive definite, and only for those,
            until they are; 0: no second try.
        factor_dtype: float32 or float64, of the factorisation and the result; None: that of ``H``. In float64 the
            relative error falls to that of ``H``: with 256 tokens, ``N = 1024`` and :math:`p = 0.01` from 1.3e-4 to
            5e-5 for ``H`` summed in float32, and to 8e-6 for ``H`` summed in float64.
        inverse: return :math:`U`; else :math:`R`, for about half of the time.

    Returns:
        The factor, ``(..., N, N)``, zero below the diagonal; the share :math:`p` that was used, ``(...)``, float64, NaN
        for items without a factor; and ``info``, ``(...)``, int32: 0, or ``-k`` if ``k`` columns never saw an input,
        or without a factor 1: not positive definite, 2: ``H`` is not finite, 3: no column ever saw an input.

    Raises:
        TypeError: ``H`` is no dense float32 or float64 tensor, ``factor_dtype`` is neither.
        ValueError: ``H`` is not square, ``damp_percent`` or ``damp_auto_increment`` is negative or above 1.
        RuntimeError: a derivative is asked for.

    :math:`N^3 / 6` multiplications and additions for :math:`R`, at least as many again for :math:`U` (chol, inverse and
    chol again: :math:`2 N^3 / 3`). On CUDA, nothing waits for the device unless ``damp_auto_increment > 0``. Frantar et
    al., GPTQ (arXiv 2210.17323), section 3.3.

    Example:
        >>> import torch
        >>> from gradops.quant import hessian_factor
        >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> U, damp, info = hessian_factor(H, damp_percent=0.0)
        >>> torch.testing.assert_close(U.T @ U, H.inverse())
        >>> int(info)
        0
    """
    check_tensor(H, "H")
    for dtype, name in ((H.dtype, "H"), (factor_dtype or H.dtype, "factor_dtype")):
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {dtype}")
    if H.dim() < 2 or H.shape[-1] != H.shape[-2]:
        raise ValueError(f"H must have shape (..., N, N), got {tuple(H.shape)}")
    for value, name in ((damp_percent, "damp_percent"), (damp_auto_increment, "damp_auto_increment")):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be 0 to 1, got {value}")
    refuse_derivative("hessian_factor", H=H)
    return _op(H.to(factor_dtype or H.dtype), float(damp_percent), float(damp_auto_increment), bool(inverse))


def _factor(h: Tensor, out: Tensor, percent: float, increment: float, inverse: bool) -> tuple[Tensor, Tensor]:
    n = h.shape[-1]
    diagonal = h.diagonal(0, -2, -1)
    dead = diagonal == 0
    count = dead.sum(-1)
    finite = h.amax((-2, -1)).isfinite() & h.amin((-2, -1)).isfinite() if n else count == 0  # both carry NaN
    info = torch.where(finite, torch.where((count == n) & (n > 0), UNSEEN, -count), NOT_FINITE).int()
    mean = (diagonal + dead).mean(-1) if n else diagonal.sum(-1)
    damp = h.new_full((len(h),), percent, dtype=torch.float64)
    tries = 0

    def attempt(which: slice | Tensor) -> Tensor:
        """Factors these items into `out`; which of them are not definite."""
        target = out[which] if tries == 0 else out[which].zero_()
        added = damp[which].to(h.dtype) * mean[which]
        failed = _reversed_cholesky(h[which], dead[which] + added[:, None], target)
        if not isinstance(which, slice):
            out[which] = target
        return failed & (info[which] <= 0)

    failed = attempt(slice(None))
    while increment > 0 and percent + (tries + 1) * increment <= 1 and bool(failed.any()):
        tries += 1
        again = slice(None) if len(h) == 1 else failed.nonzero()[:, 0]
        damp[again] = percent + tries * increment
        failed[again] = attempt(again)
    info = torch.where(failed, NOT_DEFINITE, info)
    bad = info > 0
    _to_identity(out, bad)
    if inverse:
        _invert_(out)
    return damp.masked_fill(bad, torch.nan), info


def _to_identity(x: Tensor, which: Tensor) -> None:
    if may_hold(which):
        x.masked_fill_(which[:, None, None], 0).diagonal(0, -2, -1).masked_fill_(which[:, None], 1)


def _reversed_cholesky(h: Tensor, added: Tensor, out: Tensor) -> Tensor:
    """R upper with R R^T = h, with this added to its diagonal, item by item, into `out`, which is zero; which items
    have none. Only the upper triangle of h is used."""
    n = h.shape[-1]
    failed = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    # Block by block from the last, each after what the ones after it leave: one narrow and deep product. LAPACK
    # reaches a quarter of the rate of products; cuSOLVER does not need our help.
    size = MOST_COLUMNS if h.device.type == "cpu" else max(n, 1)
    for begin in range((n - 1) // size * size, -1, -size):
        end = min(begin + size, n)
        here, above = slice(begin, end), slice(0, begin)
        rest = h.new_empty(len(h), end, end - begin)
        gptq_spread_(rest, out[:, :end, end:], out[:, here, end:].mT, fresh=True, base=h[:, :end, here])
        rest[:, here].diagonal(0, -2, -1).add_(added[:, here])
        out[:, here, here], inverse, bad = upper_factor(rest[:, here])
        failed |= bad
        if begin > 0:
            gptq_spread_(out[:, above, here], rest[:, above], inverse.mT, add=True, fresh=True)
    return failed


def _invert_(r: Tensor) -> None:
    """Upper triangular r <- r^-1, in halves: [A B; 0 C]^-1 = [A^-1, -A^-1 B C^-1; 0, C^-1]."""
    n = r.shape[-1]
    if n <= MOST_COLUMNS:
        r.copy_(upper_factor(r, factored=True)[1])
        return
    half = (n // MOST_COLUMNS + 1) // 2 * MOST_COLUMNS
    a, b, c = r[:, :half, :half], r[:, :half, half:], r[:, half:, half:]
    _invert_(a)
    _invert_(c)
    # Both triangles in strips: what is below their diagonals is not multiplied.
    product = fresh_like(b).zero_()
    for begin in range(0, c.shape[-1], step := max(MOST_COLUMNS, c.shape[-1] // 4)):
        end = min(begin + step, c.shape[-1])
        gptq_spread_(product[:, :, begin:end], b[:, :, :end], c[:, :end, begin:end], add=True)
    b.zero_()
    for begin in range(0, half, step := max(MOST_COLUMNS, half // 4)):
        end = min(begin + step, half)
        gptq_spread_(b[:, begin:end], a[:, begin:end, begin:], product[:, begin:])
