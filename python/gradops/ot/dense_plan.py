"""The plan of entropic transport, whose entries are all positive: kept as its potentials."""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRIES = 1 << 20  # made at once where the plan is not stored


def gibbs(costs: Tensor, alpha: Tensor, beta: Tensor, reg: float) -> Tensor:
    """exp((alpha_i + beta_j - c_ij) / reg) in float64; 0 where a potential is -infinity, whatever the cost."""
    none = (alpha == -torch.inf).unsqueeze(-1) | (beta == -torch.inf).unsqueeze(-2)
    exponent = (alpha.unsqueeze(-1) + beta.unsqueeze(-2) - costs) / reg
    return exponent.masked_fill(none, -torch.inf).exp()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(..., n, m) from (..., n, d) and (..., m, d), coordinate by coordinate: nothing cancels."""
    out = x.new_zeros(*x.shape[:-1], y.shape[-2])
    for k in range(x.shape[-1]):
        out = out + (x[..., k].unsqueeze(-1) - y[..., k].unsqueeze(-2)).square()
    return out


@dataclass(frozen=True)
class DensePlan:
    """``t_ij = exp((alpha_i + beta_j - c_ij) / reg)``, evaluated when it is asked for; all in float64.

    costs: ``(..., n, m)``; or points ``(..., n, d)``, with ``y`` ``(..., m, d)``, at squared Euclidean distances, of
    which only a strip is made at a time by everything but ``to_dense``.
    """

    costs: Tensor
    y: Tensor | None
    alpha: Tensor
    beta: Tensor
    reg: float

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.alpha.shape, self.beta.shape[-1]))

    def rows(self, begin: int, end: int) -> Tensor:
        """``(..., end - begin, m)``"""
        costs = self.costs[..., begin:end, :].double()
        if self.y is not None:
            costs = squared_distances(costs, self.y.double())
        return gibbs(costs, self.alpha[..., begin:end], self.beta, self.reg)

    def to_dense(self) -> Tensor:
        """``(..., n, m)``"""
        return self.rows(0, self.alpha.shape[-1])

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Row by row blocks: their rows and their entries."""
        n, m = self.shape[-2:]
        step = max(1, _ENTRIES // max(1, self.alpha[..., :1].numel() * m))
        for begin in range(0, n, step):
            end = min(begin + step, n)
            yield slice(begin, end), self.rows(begin, end)

    def apply(self, v: Tensor) -> Tensor:
        """``T v`` for ``v`` ``(..., m, p)``: ``(..., n, p)``."""
        v = v.double()
        blocks = [t @ v for _, t in self.strips()]
        return torch.cat(blocks, -2) if blocks else v.new_zeros(*self.alpha.shape, v.shape[-1])

    def apply_transpose(self, v: Tensor) -> Tensor:
        """``T' v`` for ``v`` ``(..., n, p)``: ``(..., m, p)``."""
        v = v.double()
        out = v.new_zeros(*self.beta.shape, v.shape[-1])
        for rows, t in self.strips():
            out = out + t.mT @ v[..., rows, :]
        return out
