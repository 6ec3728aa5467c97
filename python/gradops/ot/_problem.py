"""What the functions of this family share about their arguments."""
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_one_of


class Costs(NamedTuple):
    """Costs of a batch of problems: a matrix, or the points whose squared distances they are."""

    M: Tensor | None
    x: Tensor | None
    y: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    @property
    def size(self) -> tuple[int, int]:
        """n and m"""
        if self.M is not None:
            return self.M.shape[-2], self.M.shape[-1]
        assert self.x is not None and self.y is not None
        return self.x.shape[-2], self.y.shape[-2]

    @property
    def batch(self) -> tuple[int, ...]:
        return torch.broadcast_shapes(*(t.shape[:-2] for t in self.tensors))

    def expand(self, batch: tuple[int, ...]) -> "Costs":
        return Costs(*(None if t is None else t.expand(*batch, *t.shape[-2:]) for t in self))


def check_costs(M: Tensor | None, x: Tensor | None, y: Tensor | None, metric: str) -> Costs:
    """Either M (..., n, m), or points x (..., n, d) and y (..., m, d) of one dtype."""
    check_one_of(metric, "metric", ("sqeuclidean",))
    if (M is None) == (x is None and y is None):
        raise ValueError("the costs must be given either as M or as points x and y")
    for name, t in (("M", M), ("x", x), ("y", y)):
        if (M is None) != (name == "M"):
            check_floating(t, name)
            assert t is not None
            if t.dim() < 2:
                raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(t.shape)}")
    if M is None:
        assert x is not None and y is not None
        if x.shape[-1] != y.shape[-1]:
            raise ValueError(f"y must have points of {x.shape[-1]} coordinates, as x has, got shape {tuple(y.shape)}")
        if x.dtype != y.dtype:
            raise TypeError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")
        check_device(y, "y", x, "x")
    return Costs(M, x, y)


def check_weights(t: Tensor, name: str, size: int, costs: Costs) -> None:
    """t must be a floating-point tensor (..., size) where the costs are."""
    check_floating(t, name)
    if t.dim() < 1 or t.shape[-1] != size:
        raise ValueError(f"{name} must have shape (..., {size}) for costs of {' x '.join(map(str, costs.size))}, got "
                         f"{tuple(t.shape)}")
    check_device(t, name, costs.tensors[0], "the costs")


def check_reg(reg: float) -> None:
    if not 0 < reg < float("inf"):
        raise ValueError(f"reg must be positive and finite, got {reg}")


def check_max_nz(max_nz: int | None) -> None:
    if max_nz is not None and max_nz < 1:
        raise ValueError(f"max_nz must be at least 1, or None, got {max_nz}")
