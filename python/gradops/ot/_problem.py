"""What the functions of this family share about their arguments."""
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_count, check_device, check_floating, check_integers, check_number, check_one_of


class Costs(NamedTuple):
    """Costs of a batch of problems: a matrix, or the points whose squared distances they are."""

    M: Tensor | None
    x: Tensor | None
    y: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    @property
    def first(self) -> Tensor:
        t = self.x if self.M is None else self.M
        assert t is not None
        return t

    @property
    def size(self) -> tuple[int, int]:
        """n and m"""
        if self.M is not None:
            n, m = self.M.shape[-2:]
            return n, m
        assert self.x is not None and self.y is not None
        return self.x.shape[-2], self.y.shape[-2]

    @property
    def batches(self) -> list[torch.Size]:
        return [t.shape[:-2] for t in self.tensors]


def common_batch(*shapes: torch.Size) -> tuple[int, ...]:
    """What these leading dimensions broadcast to; quickly where they are all alike."""
    first = shapes[0]
    for shape in shapes:
        if shape != first:
            return tuple(torch.broadcast_shapes(*shapes))
    return tuple(first)


def in_batch(t: Tensor, batch: tuple[int, ...], own: int) -> Tensor:
    """t with these leading dimensions, and the `own` last ones that it has."""
    return t if (t.dim() == own and not batch) or t.shape[:-own] == batch else t.expand(*batch, *t.shape[-own:])


def check_costs(M: Tensor | None, x: Tensor | None, y: Tensor | None, metric: str) -> Costs:
    """Either M (..., n, m), or points x (..., n, d) and y (..., m, d) of one dtype."""
    check_one_of(metric, "metric", ("sqeuclidean",))
    if (M is None) == (x is None and y is None):
        raise ValueError("the costs must be given either as M or as points x and y")
    for name, t in (("M", M),) if M is not None else (("x", x), ("y", y)):
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
    shape = t.shape
    if not shape or shape[-1] != size:
        raise ValueError(f"{name} must have shape (..., {size}) for costs of {' x '.join(map(str, costs.size))}, got "
                         f"{tuple(shape)}")
    check_device(t, name, costs.first, "the costs")


def check_reg(reg: float) -> None:
    check_number(reg, "reg")
    if not 0 < reg < float("inf"):
        raise ValueError(f"reg must be positive and finite, got {reg}")


def check_max_nz(max_nz: int | None) -> None:
    if max_nz is not None:
        check_count(max_nz, "max_nz")


def whole_problem(M: Tensor | None, a: Tensor | None, b: Tensor | None, x: Tensor | None, y: Tensor | None,
                  n_len: Tensor | None, m_len: Tensor | None
                  ) -> tuple[Costs, Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Costs, weights in float64 and lengths in int64, all of one batch."""
    costs = check_costs(M, x, y, "sqeuclidean")
    n, m = costs.size
    like = costs.tensors[0]
    shapes = costs.batches
    for t, name, size in ((a, "a", n), (b, "b", m)):
        if t is not None:
            check_weights(t, name, size, costs)
            shapes.append(t.shape[:-1])
    for t, name in ((n_len, "n_len"), (m_len, "m_len")):
        if t is not None:
            check_integers(t, name)
            check_device(t, name, like, "the costs")
            shapes.append(t.shape)
    batch = common_batch(*shapes)
    rows, columns = (None if t is None else t.to(torch.int64).expand(batch) for t in (n_len, m_len))
    one = a is None and b is None and rows is None and n > 0  # is the sum of weights
    if a is None:
        a = _uniform(like, n, rows, 1.0 if b is None else inside(b.to(torch.float64), m, columns).sum(-1, keepdim=True))
    if b is None:
        b = _uniform(like, m, columns, 1.0 if one else inside(a.to(torch.float64), n, rows).sum(-1, keepdim=True))
    a, b = (_weights_of(t, batch) for t in (a, b))
    costs = Costs(*(None if t is None else in_batch(t, batch, 2) for t in costs))
    return costs, a, b, (rows, columns)


def inside(weights: Tensor, size: int, length: Tensor | None) -> Tensor:
    """Weights, 0 from `length` on."""
    if length is None:
        return weights
    return torch.where(torch.arange(size, device=weights.device) < length[..., None], weights, 0.0)


def _weights_of(t: Tensor, batch: tuple[int, ...]) -> Tensor:
    if t.dtype != torch.float64:
        t = t.to(torch.float64)
    return t if t.shape[:-1] == batch else t.expand(*batch, t.shape[-1])


def _uniform(like: Tensor, size: int, length: Tensor | None, total: Tensor | float) -> Tensor:
    if length is None and isinstance(total, float):
        return torch.full((size,), total / max(size, 1), dtype=torch.float64, device=like.device)
    ones = torch.ones(size, dtype=torch.float64, device=like.device)
    count = max(size, 1) if length is None else length[..., None].to(torch.float64)
    return inside(ones, size, length) * (total / count)
