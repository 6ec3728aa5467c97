"""The factor of a small block and its inverse. The kernel is for the CPU; on CUDA cuSOLVER and cuBLAS do it."""
import torch
from torch import Tensor

from .._op import register

MOST_COLUMNS = 128  # of the kernel

_op = register("upper_factor", vmap=False, fake=lambda h, factored: (
    torch.empty_like(h, memory_format=torch.contiguous_format),
    torch.empty_like(h, memory_format=torch.contiguous_format), h.new_empty(h.shape[:1], dtype=torch.bool)))


def upper_factor(h: Tensor, factored: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """R upper triangular with R R^T = h, (items, n, n), its inverse, and which items have none; or, `factored`, h is R
    already. What is below the diagonal is not read."""
    if h.device.type == "cpu":
        return _op(h, factored)
    if factored:
        factor, failed = h.triu(), torch.zeros(len(h), dtype=torch.bool, device=h.device)
    else:
        lower, code = torch.linalg.cholesky_ex(h.flip(-2, -1))
        factor, failed = lower.flip(-2, -1), code > 0
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand_as(h)
    return factor, torch.linalg.solve_triangular(factor, identity, upper=True), failed
