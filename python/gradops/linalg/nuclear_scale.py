"""The factor by which PolarGrad scales an orthogonal update."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_matrix
from .._compiler import allow_in_graph
from .._op import KeepsInputs, needs_derivative, primals, register

_op = register("nuclear_scale", fake=lambda m, u: m.new_empty(m.shape[:-2], dtype=torch.float64))


@allow_in_graph
def nuclear_scale(M: Tensor, U: Tensor) -> Tensor:
    r"""The inner product of each pair of matrices.

    .. math:: \nu = \langle M, U \rangle_F = \sum_{ij} M_{ij} U_{ij}

    With ``U`` the polar factor of ``M`` this is the nuclear norm :math:`\|M\|_*`, and its gradient is ``U``.

    Args:
        M, U: ``(..., m, n)``, of one shape and dtype (float64, float32, bfloat16, float16) on one device.

    Returns:
        ``(...)``; float64 for float64 input, else float32. Summed in float64.

    Raises:
        TypeError: an argument is no dense real floating-point tensor, or the dtypes differ.
        ValueError: fewer than 2 dimensions, or shapes or devices differ.

    PolarGrad (arXiv 2505.21799), section 3. Reads both once. Differentiable to any order.

    Example:
        >>> import torch
        >>> from gradops.linalg import nuclear_scale
        >>> nuclear_scale(torch.diag(torch.tensor([2.0, 3.0])), torch.eye(2))
        tensor(5.)
    """
    check_matrix(M, "M")
    check_matrix(U, "U")
    if M.shape != U.shape:
        raise ValueError(f"U must have the shape of M, {tuple(M.shape)}, got {tuple(U.shape)}")
    if M.dtype != U.dtype:
        raise TypeError(f"U must have the dtype of M, {M.dtype}, got {U.dtype}")
    if M.device != U.device:
        raise ValueError(f"U must be on the device of M, {M.device}, got {U.device}")
    out = _NuclearScale.apply(M, U) if needs_derivative(M, U) else _op(M, U)
    return out if M.dtype == torch.float64 else out.float()


class _NuclearScale(KeepsInputs):
    @staticmethod
    def forward(m: Tensor, u: Tensor) -> Tensor:
        return _op(m, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        m, u = ctx.saved_tensors
        grad = grad[..., None, None].to(m.dtype)
        return grad * u, grad * m

    @staticmethod
    def jvp(ctx: Any, dm: Tensor | None, du: Tensor | None):
        m, u = primals(ctx.saved_tensors)
        parts = [(a.double() * b).sum((-2, -1)) for a, b in ((dm, u), (m, du)) if a is not None and b is not None]
        return sum(parts)
