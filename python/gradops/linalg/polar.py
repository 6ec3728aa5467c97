"""Polar decomposition, differentiable to second order."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_matrix
from .._compiler import allow_in_graph
from .._op import Function, _library, needs_derivative, primals, register
from .._precision import matmul_precision
from .newton_schulz import _PRECISIONS
from .polar_methods import METHODS, polar_factor
from .sylvester import Sylvester, positive_eigen

_library.define("polar(Tensor A, str side, str method, bool compute_h, str? precision) -> (Tensor, Tensor)")


@torch.library.impl(_library, "polar", "CompositeExplicitAutograd")
def _polar(a: Tensor, side: str, method: str, compute_h: bool, precision: str | None) -> tuple[Tensor, Tensor]:
    u = polar_factor(a, method, precision)
    if not compute_h:
        return u, a.new_empty(0)
    with matmul_precision("highest"):
        return u, _hermitian(u.mT, a.mT) if side == "right" else _hermitian(u, a)


def _fake(a: Tensor, side: str, method: str, compute_h: bool, precision: str | None) -> tuple[Tensor, Tensor]:
    n = a.shape[-1 if side == "right" else -2]
    return (torch.empty_like(a, memory_format=torch.contiguous_format),
            a.new_empty((*a.shape[:-2], n, n) if compute_h else (0,)))


# Without H the second result has no batch dimension to find again, so vmap goes by the rule below.
_op = register("polar", fake=_fake, vmap=False)


@torch.library.register_vmap("gradops::polar")
def _vmap(info, in_dims, a, side, method, compute_h, precision):
    u, h = torch.ops.gradops.polar(a.movedim(in_dims[0], 0), side, method, compute_h, precision)
    return (u, h), (0, 0 if compute_h else None)


@allow_in_graph
def polar(A: Tensor, *, side: str = "right", method: str = "auto", compute_h: bool = True,
          precision: str | None = None) -> tuple[Tensor, Tensor | None]:
    r"""Factors each matrix into one with orthonormal columns (or rows) and a symmetric positive semidefinite one.

    .. math:: A = U H \quad (\text{right}), \qquad A = H U \quad (\text{left})

    With the singular value decomposition :math:`A = W \Sigma V^\top`: :math:`U = W V^\top`,
    :math:`H = V \Sigma V^\top` (right) or :math:`W \Sigma W^\top` (left), as in ``scipy.linalg.polar`` and
    ``torch.linalg.polar``. A tall ``U`` has orthonormal columns, a wide one orthonormal rows.

    Where ``A`` has no full rank, ``U`` is one of many such factors (as with an SVD); that of a zero matrix is
    ``torch.eye(m, n)``. The scale of ``A`` does not matter; a NaN or infinity makes its own matrix's result NaN.

    Args:
        A: ``(..., m, n)``; float64, float32, bfloat16 or float16 (the last two compute in float32 and round once).
            Not modified.
        side: ``"right"`` or ``"left"``.
        method: ``"auto"`` is as accurate as an SVD for every matrix: on CPU polynomials as in ``"polar_express"``, as
            many as a matrix of that shape needs, tested for orthogonality and backward error, and an SVD of each matrix
            that does not pass (and of those beyond 512 that are not twice as long as wide, in float64 or without
            AVX-512); ``"qdwh"`` on CUDA. ``"svd"``. ``"qdwh"``: dynamically weighted Halley iteration with Cholesky
            steps in float64. ``"zolo"``: Zolotarev's rational functions, two iterations of many independent
            factorisations. Both converge from any input, waiting for nothing on the device.
            ``"polar_express"`` (10 steps) and ``"newton_schulz"`` (22 classical steps): products only; they converge
            where no singular value is below about 1e-3, 1e-4 times the Frobenius norm.
        compute_h: whether to compute ``H``; else it is None.
        precision: of float32 products in ``"newton_schulz"`` and ``"polar_express"``, as in
            :func:`newton_schulz`. The other methods, ``H`` and derivatives are always in full precision.

    Returns:
        ``U``, ``(..., m, n)``, and ``H``, ``(..., n, n)`` (right) or ``(..., m, m)`` (left), exactly symmetric.
        A matrix's result in a batch equals its own to within rounding.

    Raises:
        TypeError: ``A`` is no dense real floating-point tensor.
        ValueError: ``A`` has fewer than 2 dimensions, or ``side``, ``method`` or ``precision`` is none of those above.
        RuntimeError: a derivative is asked for where ``A`` has no full rank: there is none.

    :math:`O(mn \min(m, n))` operations. The derivative, with :math:`m \ge n` and :math:`C = U^\top G`,

    .. math:: L(G) = (G - U C) H^{-1} + U X, \qquad H X + X H = C - C^\top,

    is self-adjoint, so it serves both modes; it holds where singular values coincide, and is itself differentiable.

    Sources: Higham, Functions of Matrices, chapter 8. Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31 (2010)
    for QDWH; Nakatsukasa and Freund, SIAM Review 58 (2016) for Zolotarev; arXiv 2505.16932 for Polar Express.

    Example:
        >>> import torch
        >>> from gradops.linalg import polar
        >>> A = torch.tensor([[0.0, -2.0], [3.0, 0.0]])
        >>> U, H = polar(A)
        >>> torch.testing.assert_close(U, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> torch.testing.assert_close(H, torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    """
    check_matrix(A, "A")
    check_choice(side, "side", ("right", "left"))
    check_choice(method, "method", METHODS)
    if precision is not None:
        check_choice(precision, "precision", _PRECISIONS)
    a = A.float() if A.dtype in (torch.bfloat16, torch.float16) else A
    if not needs_derivative(A):
        u, h = _op(a, side, method, bool(compute_h), precision)
        return u.to(A.dtype), h.to(A.dtype) if compute_h else None
    wide = a.shape[-2] < a.shape[-1]
    u = _PolarFactor.apply(a.mT if wide else a, method, precision)
    u = u.mT if wide else u
    if not compute_h:
        return u.to(A.dtype), None
    # In float64 no setting of torch can lower the precision of products, also of those in the derivatives.
    h = u.double().mT @ a.double() if side == "right" else u.double() @ a.double().mT
    return u.to(A.dtype), ((h + h.mT) / 2).to(A.dtype)


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _hermitian(u: Tensor, a: Tensor) -> Tensor:
    """U A^T, which is symmetric but for rounding, made so exactly; large ones by blocks, each pair computed once."""
    n, block = u.shape[-2], 256
    if n <= 2 * block:
        h = u @ a.mT
        return (h + h.mT).mul_(0.5)
    h = a.new_empty((*a.shape[:-2], n, n))
    for i in range(0, n, block):
        rows = u[..., i:i + block, :] @ a[..., :i + block, :].mT
        square = rows[..., i:]
        square.copy_((square + square.mT).mul_(0.5))
        h[..., i:i + block, :i + block] = rows
        h[..., :i, i:i + block] = rows[..., :i].mT
    return h


class _PolarFactor(Function):
    """U of tall or square A, in float32 or float64."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, method: str, precision: str | None) -> Tensor:
        return _op(a, "right", method, False, precision)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        a, u = ctx.saved_tensors
        return _derivative(a, u, grad), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_):
        a, u = primals(ctx.saved_tensors)
        return _derivative(a, u, tangent)


def _derivative(a: Tensor, u: Tensor, direction: Tensor) -> Tensor:
    """The derivative of U at a in this direction; by self-adjointness also the gradient for this cotangent."""
    tolerance = a.shape[-2] * torch.finfo(a.dtype).eps
    a, u, g = a.double(), u.double(), direction.double()
    h = u.mT @ a
    h = (h + h.mT) / 2
    values, q = positive_eigen(h.detach(), tolerance, (
        "the polar factor of A has no derivative where A has no full rank; a matrix of A has a singular value "
        "that is zero to working precision"))
    c = u.mT @ g
    out = u @ Sylvester.apply(h, c - c.mT, values, q)
    if a.shape[-2] > a.shape[-1]:
        out = out + torch.linalg.solve(h, g - u @ c, left=False)
    return out.to(direction.dtype)
