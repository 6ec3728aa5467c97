"""What GPTAQ's compensation walks along beside the factor."""
import torch
from torch import Tensor

from .._precision import matmul_precision
from ._columns import fresh_like, items_together
from .gptq_spread import gptq_spread_
from .upper_factor import MOST_COLUMNS, upper_factor


def drift_of(D: Tensor, factor: Tensor, inverse: bool, alpha: float) -> Tensor:
    """M = alpha triu(D U^T, 1), item by item; the factor is U, or R = U^-1, from which M R^T = alpha D is solved."""
    out = fresh_like(factor).zero_()
    step = items_together(factor)
    with matmul_precision("highest"):
        for first in range(0, len(factor), step):
            some = slice(first, first + step)
            _drift(D[some], factor[some], inverse, alpha, out[some])
    return out


def _drift(D: Tensor, factor: Tensor, inverse: bool, alpha: float, out: Tensor) -> None:
    """Block by block of columns from the last: a column of M needs those after it, and no rows below its own."""
    n = factor.shape[-1]
    for begin in range((n - 1) // MOST_COLUMNS * MOST_COLUMNS, -1, -MOST_COLUMNS):
        end = min(begin + MOST_COLUMNS, n)
        here, target = slice(begin, end), out[:, :end, begin:end]
        if inverse:
            gptq_spread_(target, D[:, :end, begin:], factor[:, here, begin:].mT, add=True)
            target.mul_(alpha)
        else:
            rest = torch.mul(D[:, :end, here], alpha)
            gptq_spread_(rest, out[:, :end, end:], factor[:, here, end:].mT)
            gptq_spread_(target, rest, upper_factor(factor[:, here, here], factored=True)[1].mT, add=True)
        out[:, here, here].triu_(1)
