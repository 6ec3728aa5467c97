"""Inverse square root of positive definite matrices, differentiable to second order."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_matrix
from .._compiler import allow_in_graph
from .._op import Function, _library, needs_derivative, primals, register
from .._precision import matmul_precision
from .coefficients import resolve
from .newton_schulz import polynomials
from .polar_methods import SMALL, SPECTRAL, _orthonormal, converging_steps, spectral_norm
from .sylvester import Sylvester, positive_eigen

_library.define("inv_sqrt(Tensor A, float eps) -> Tensor")


@torch.library.impl(_library, "inv_sqrt", "CompositeExplicitAutograd")
def _inv_sqrt(a: Tensor, eps: float) -> Tensor:
    if a.numel() == 0:
        return torch.empty_like(a)
    # eigh may fail for the whole batch where one matrix is not finite.
    finite = torch.isfinite(a.amax((-2, -1), keepdim=True) - a.amin((-2, -1), keepdim=True))
    with matmul_precision("highest"):
        if a.is_cuda:  # nothing here may wait for the device
            return _by_eigenvectors(torch.where(finite, a, torch.nan), finite, eps)
        if not bool(finite.all()):
            a = torch.where(finite, a, torch.nan)
        if a.numel() * a.shape[-1] <= SMALL:
            return _by_eigenvectors(a, finite, eps)
        flat = a.reshape(-1, *a.shape[-2:])
        s, good = _by_products(flat, eps)
        if not bool(good.all()):
            s[~good] = _by_eigenvectors(flat[~good], finite.reshape(-1, 1, 1)[~good], eps)
        return s.reshape(a.shape)


def _by_eigenvectors(a: Tensor, finite: Tensor, eps: float) -> Tensor:
    values, q = torch.linalg.eigh(torch.where(finite, a, 0))
    values = values + eps
    positive = finite[..., 0] & (values[..., :1] > 0)
    values = torch.where(positive, values, torch.nan)  # a NaN eigenvalue is one in every entry
    return (q * values.rsqrt()[..., None, :]) @ q.mT


def _by_products(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A = R^T R and R = U H give A^(-1/2) = R^(-1) U, with U by polynomials. Several times faster than eigenvectors,
    for matrices of which the second result is true: positive definite, condition number below about 1e6 / n."""
    a = a.tril()
    diagonal = a.diagonal(dim1=-2, dim2=-1).add_(eps)
    lower, info = torch.linalg.cholesky_ex(a)
    # ||A||_F^(1/2) bounds R's largest singular value far better than ||R||_F, which spares some of the steps.
    square = 2 * torch.linalg.matrix_norm(a)**2 - torch.linalg.vector_norm(diagonal, dim=-1)**2
    bound = square.sqrt().sqrt()
    if a.shape[-1] >= SPECTRAL:
        bound = torch.minimum(bound, spectral_norm(lower))
    bound = bound[..., None, None]
    lower /= bound
    steps = converging_steps(lower.diagonal(dim1=-2, dim2=-1).amin(-1) / 3)  # a guess: u is tested
    u = torch.empty_like(lower)
    for n in steps.unique().tolist():
        items = slice(None) if bool((steps == n).all()) else steps == n
        u[items] = polynomials(lower[items].mT, resolve("polar_express", 8)[8 - n:])
    s = torch.linalg.solve_triangular(lower, u.mT, upper=False, left=False) / bound
    return (s + s.mT).mul_(0.5).contiguous(), (info == 0) & _orthonormal(u)


_op = register("inv_sqrt", fake=lambda a, eps: torch.empty_like(a, memory_format=torch.contiguous_format))


@allow_in_graph
def inv_sqrt(A: Tensor, *, eps: float = 0.0) -> Tensor:
    r"""Inverse square root of each symmetric positive definite matrix.

    .. math:: S = (A + \epsilon I)^{-1/2}, \qquad S (A + \epsilon I) S = I

    Only the lower triangle of ``A`` is read, as by ``torch.linalg.eigh``. A matrix with an eigenvalue of
    ``A + eps I`` that is not positive has no such root: its result is NaN, and so is that of a matrix with a NaN or
    infinity; others in the batch are not affected.

    Args:
        A: ``(..., n, n)``, symmetric; float64, float32, bfloat16 or float16 (the last two compute in float32).
        eps: added to the diagonal, in the units of ``A``.

    Returns:
        ``(..., n, n)``, of the dtype of ``A``.

    Raises:
        TypeError: ``A`` is no dense real floating-point tensor.
        ValueError: ``A`` is not square, or ``eps`` is negative.

    :math:`O(n^3)`; by matrix products on CPU, for matrices whose condition number is below about :math:`10^6 / n`,
    and by the eigenvectors for others and on CUDA. The derivative solves
    :math:`S X + X S = -S^2\, dA\, S^2`, also where eigenvalues coincide, to any order; ``dA`` counts as symmetric.
    Source: Higham, Functions of Matrices, chapter 6.

    Example:
        >>> import torch
        >>> from gradops.linalg import inv_sqrt
        >>> inv_sqrt(torch.diag(torch.tensor([4.0, 16.0])))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    check_matrix(A, "A")
    if A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square (..., n, n), got shape {tuple(A.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    a = A.float() if A.dtype in (torch.bfloat16, torch.float16) else A
    return (_InvSqrt.apply(a, float(eps)) if needs_derivative(a) else _op(a, float(eps))).to(A.dtype)


class _InvSqrt(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, eps: float) -> Tensor:
        return _op(a, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        s, eigen = _eigen(*ctx.saved_tensors)
        x = Sylvester.apply(s, _symmetric(grad.double()), *eigen)
        return (-s @ s @ x @ s @ s).to(grad.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_):
        s, eigen = _eigen(*primals(ctx.saved_tensors))
        return Sylvester.apply(s, -s @ s @ _symmetric(tangent.double()) @ s @ s, *eigen).to(tangent.dtype)


def _eigen(s: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """In float64, which no setting of torch's precision of products reaches."""
    s = _symmetric(s.double())
    what = "the inverse square root of A has no derivative: A is not positive definite"
    return s, positive_eigen(s.detach(), 0.0, what)


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2
