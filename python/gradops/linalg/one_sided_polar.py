"""The one-sided spectral update of symmetry-compatible optimizers."""
import torch
from torch import Tensor

from .._checks import check_matrix
from .._compiler import allow_in_graph
from .._op import _library, needs_derivative, register
from .._precision import matmul_precision
from .inv_sqrt import inv_sqrt
from .nuclear_scale import nuclear_scale
from .polar import check_choice, polar

_library.define("one_sided_factor(Tensor m, float eps) -> Tensor")


@torch.library.impl(_library, "one_sided_factor", "CompositeExplicitAutograd")
def _factor(m: Tensor, eps: float) -> Tensor:
    """u of tall or square M."""
    if m.is_cuda or m.shape[-2] < 2 * m.shape[-1]:
        return _stacked(m, eps).contiguous()
    # The Gram matrix costs digits in proportion to its condition number, of which this is a bound.
    with matmul_precision("highest"):
        flat = m.reshape(-1, *m.shape[-2:])
        gram = flat.mT @ flat
        s = inv_sqrt(gram, eps=eps)
        bound = torch.linalg.matrix_norm(gram) * torch.linalg.matrix_norm(s)**2
        good = bound <= 30 * m.shape[-1]**1.5
        u = flat @ s
        if not bool(good.all()):
            u[~good] = _stacked(flat[~good], eps)
    return u.reshape(m.shape)


_op = register("one_sided_factor", fake=lambda m, eps: torch.empty_like(m, memory_format=torch.contiguous_format))


def _stacked(m: Tensor, eps: float) -> Tensor:
    """The upper part of the polar factor of M on top of sqrt(eps) I."""
    ridge = eps**0.5 * torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    stacked = torch.cat([m, ridge.expand(*m.shape[:-2], -1, -1)], -2)
    return polar(stacked, compute_h=False)[0][..., :m.shape[-2], :]


@allow_in_graph
def one_sided_polar(x: Tensor, *, side: str = "right", alpha: float = 1.0, center: bool = False,
                    eps: float = 1e-8) -> Tensor:
    r"""Scales the regularised polar factor of each matrix by a power of its nuclear norm.

    .. math:: u = M (M^\top M + \epsilon I)^{-1/2} \text{ (right)}, \quad u = (M M^\top + \epsilon I)^{-1/2} M
              \text{ (left)}, \qquad y = \max(\langle M, u \rangle, \epsilon)^\alpha\, u

    Both sides name the same ``u``; it is computed on the short one. Where the Gram matrix would cost digits, ``u`` is
    the upper part of the polar factor of ``M`` stacked on :math:`\sqrt\epsilon I`, accurate for any ``M``.
    With ``center=True`` the mean over the rows is subtracted from ``x`` before and from the result after.

    Args:
        x: ``(..., m, n)``; float64, float32, bfloat16 or float16 (the last two compute in float32). Not modified.
        side: ``"right"`` or ``"left"``, as the update is named.
        alpha: power of the nuclear norm; 0 leaves ``u``.
        center: project out the mean row (dimension -2) before and after.
        eps: positive, absolute, in the units of ``x`` squared (and, in the last maximum, of ``x``), as published: ``u``
            fades where singular values are below its root. Any finite scale of ``x`` is safe.

    Returns:
        A new tensor like ``x``; zero for a zero matrix, NaN for one with a NaN or infinity.

    Raises:
        TypeError: ``x`` is no dense real floating-point tensor.
        ValueError: ``x`` has fewer than 2 dimensions, ``side`` is none of those above, or ``eps`` is not positive.

    Lau and Su, arXiv 2605.18106. :math:`O(mn \min(m, n))`. Differentiable to second order.

    Example:
        >>> import torch
        >>> from gradops.linalg import one_sided_polar
        >>> one_sided_polar(torch.diag(torch.tensor([2.0, 3.0])))
        tensor([[5., 0.],
                [0., 5.]])
    """
    check_matrix(x, "x")
    check_choice(side, "side", ("right", "left"))
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    m = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    if m.numel() == 0:
        return x.clone()
    if center:
        m = m - m.mean(-2, keepdim=True)
    wide = m.shape[-2] < m.shape[-1]
    tall = m.mT if wide else m
    u = _stacked(tall, eps) if needs_derivative(m) else _op(tall, eps)
    y = nuclear_scale(tall, u)[..., None, None].clamp_min(eps).pow(alpha) * u
    y = y.mT if wide else y
    return (y - y.mean(-2, keepdim=True) if center else y).to(x.dtype).contiguous()
