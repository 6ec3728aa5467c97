"""Trace and diagonal of a matrix that is known by its products."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_count
from ._trees import Tree, template
from ._vectors import rademacher


class TraceEstimate(NamedTuple):
    """`value` and its `standard_error`, tensors of no dimension in float64; the error of one sample is NaN."""

    value: Tensor
    standard_error: Tensor


class DiagonalEstimate(NamedTuple):
    """`value` and its `standard_error`, element by element, with the structure of a vector; the error of one sample
    is NaN."""

    value: Any
    standard_error: Any


def hutchinson_trace(matvec: Callable[[Any], Any], n: int, *, like: Any = None,
                     generator: torch.Generator | None = None) -> TraceEstimate:
    r"""The trace of a matrix from n of its products with random signs.

    .. math:: \operatorname{tr} A = \operatorname{E}[z^\top A z] \approx \frac1n \sum_i z_i^\top A z_i, \qquad
              z \in \{-1, 1\}^d

    Args:
        matvec, like, generator: as of :func:`gradops.curvature.lanczos`.
        n: products. The standard error falls as :math:`1 / \sqrt n`; for a diagonal matrix it is 0.

    Source: M. Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.

    Example:
        >>> import torch
        >>> from gradops.curvature import hutchinson_trace
        >>> hutchinson_trace(lambda v: 2 * v, 4, like=torch.zeros(5)).value
        tensor(10., dtype=torch.float64)
    """
    mean, spread = _moments(matvec, n, template(matvec, like, "hutchinson_trace"), generator, _inner)
    return TraceEstimate(mean[0], _error(spread[0], n))


def hutchinson_diag(matvec: Callable[[Any], Any], n: int, *, like: Any = None,
                    generator: torch.Generator | None = None) -> DiagonalEstimate:
    r"""The diagonal of a matrix from n of its products with random signs.

    .. math:: \operatorname{diag} A \approx \frac1n \sum_i z_i \circ A z_i

    Args:
        matvec, like, generator: as of :func:`gradops.curvature.lanczos`.
        n: products. Means and errors are in the dtype of each leaf, at least float32.

    Source: C. Bekas, E. Kokiopoulou, Y. Saad, An estimator for the diagonal of a matrix, 2007.

    Example:
        >>> import torch
        >>> from gradops.curvature import hutchinson_diag
        >>> hutchinson_diag(lambda v: torch.arange(3.0) * v, 2, like=torch.zeros(3)).value
        tensor([0., 1., 2.])
    """
    tree = template(matvec, like, "hutchinson_diag")
    mean, spread = _moments(matvec, n, tree, generator, _products)
    return DiagonalEstimate(tree.build(mean), tree.build([_error(s, n) for s in spread]))


def _inner(z: list[Tensor], Az: list[Tensor]) -> list[Tensor]:
    return [torch.stack([(a.double() * b.double()).sum().to(z[0].device) for a, b in zip(z, Az, strict=True)]).sum()]


def _products(z: list[Tensor], Az: list[Tensor]) -> list[Tensor]:
    return [(a * b).to(torch.promote_types(a.dtype, torch.float32)) for a, b in zip(z, Az, strict=True)]


def _error(spread: Tensor, n: int) -> Tensor:
    return (spread / (n - 1) / n).sqrt() if n > 1 else torch.full_like(spread, torch.nan)


def _moments(
    matvec: Callable[[Any], Any], n: int, tree: Tree, generator: torch.Generator | None,
    statistic: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Means, and sums of squares about them, by Welford's recurrence: a small spread is not lost in a large mean."""
    check_count(n, "n")
    mean: list[Tensor] = []
    spread: list[Tensor] = []
    for i in range(n):
        z = [rademacher(t, generator) for t in tree.tensors]
        new = statistic(z, tree.vector(matvec(tree.build(z)), "the result of matvec")[0])
        if not mean:
            mean, spread = new, [torch.zeros_like(x) for x in new]
            continue
        for m, s, x in zip(mean, spread, new, strict=True):
            d = x - m
            m += d / (i + 1)
            s += d * (x - m)
    return mean, spread
