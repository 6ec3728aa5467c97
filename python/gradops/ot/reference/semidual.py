"""The semi-dual objective with torch.topk and a sort; SparsePlan is the family's own."""
import torch
from torch import Tensor

from ..sparse_plan import SparsePlan
from .projection import sparse_simplex_projection


def costs_of(M: Tensor | None, x: Tensor | None, y: Tensor | None) -> Tensor:
    """The matrix, or that of the points' squared distances."""
    if M is not None:
        return M
    assert x is not None and y is not None
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


def semidual(alpha: Tensor, M: Tensor | None, a: Tensor, b: Tensor, reg: float, max_nz: int | None = None, *,
             x: Tensor | None = None, y: Tensor | None = None, metric: str = "sqeuclidean",
             warm: tuple[Tensor, SparsePlan, Tensor] | None = None, width: int | None = None) -> tuple[Tensor, Tensor, SparsePlan, Tensor]:
    """See `gradops.ot.semidual`; `warm` and `width` change nothing, every column has min(max_nz, n) slots."""
    gains = (alpha[..., :, None] - costs_of(M, x, y)).mT
    scaled, indices, tau = sparse_simplex_projection(gains, max_nz, reg * b)
    weights = scaled / reg
    top = gains.gather(-1, indices)
    products = torch.where(weights > 0, weights * (top - 0.5 * reg * weights), 0)
    value = (alpha * a).sum(-1) - products.sum((-2, -1))
    mass = torch.zeros_like(gains).scatter_add(-1, indices, weights).sum(-2)
    return value, a - mass, SparsePlan(indices, weights, gains.mT.shape), tau
