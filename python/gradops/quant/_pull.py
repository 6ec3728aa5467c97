"""What GPTAQ's compensation walks along beside U."""
from torch import Tensor

from ..linalg.newton_schulz import _matmul_precision
from ._columns import fresh_like, items_together
from .gptq_spread import gptq_spread_

_STRIP = 256


def pull_of(D: Tensor, U: Tensor, alpha: float) -> Tensor:
    """P = alpha triu(D U^T, 1) U, item by item, in strips: zeros are not multiplied, which leaves a sixth."""
    out = fresh_like(U).zero_()
    step = items_together(U)
    with _matmul_precision("highest"):
        for first in range(0, len(U), step):
            some = slice(first, first + step)
            _pull(D[some], U[some], alpha, out[some])
    return out


def _pull(D: Tensor, U: Tensor, alpha: float, out: Tensor) -> None:
    n = U.shape[-1]
    strips = [slice(i, min(i + _STRIP, n)) for i in range(0, n, _STRIP)]
    half = fresh_like(out).zero_()
    for s in strips:
        gptq_spread_(half[:, : s.stop, s], D[:, : s.stop, s.start :], U[:, s, s.start :].mT, add=True)
        half[:, : s.stop, s].mul_(alpha)
        half[:, s, s].triu_(1)
        for r in strips[: s.start // _STRIP + 1]:
            gptq_spread_(out[:, r, s], half[:, r, r.start : s.stop], U[:, r.start : s.stop, s], add=True)
