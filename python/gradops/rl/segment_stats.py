"""Moments of groups, and how those of two halves, or of many ranks, become those of the whole."""
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_floating
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register
from ._groups import check_column, check_labels, check_offsets


class SegmentStats(NamedTuple):
    """Of every group: how many items (or their total weight), mean, sum of squared deviations, smallest, largest.
    All float64. Of an empty group: 0, 0, 0, inf, -inf."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mean: Tensor
    m2: Tensor
    min: Tensor
    max: Tensor


def _fake(x, offsets, ids, valid, weights, num_groups):
    groups = num_groups if offsets is None else offsets.shape[0] - 1
    return x.new_empty((*x.shape[:-1], 5, groups), dtype=torch.float64)


_op = register("segment_stats", fake=_fake, vmap=False)


@allow_in_graph
def segment_stats(x: Tensor, *, offsets: Tensor | None = None, ids: Tensor | None = None,
                  num_groups: int | None = None, valid: Tensor | None = None,
                  weights: Tensor | None = None) -> SegmentStats:
    r"""Count, mean, sum of squared deviations, minimum and maximum of every group, in float64.

    .. math::
        n_g = \sum w_i, \quad \mu_g = \frac{1}{n_g} \sum w_i x_i, \quad M_g = \sum w_i (x_i - \mu_g)^2

    The variance is ``m2 / (count - 1)``, or ``m2 / count``. Sums are exact up to one rounding per item far below
    float32's, in two passes, so that no bit depends on the order of the items or on the number of threads.

    Args:
        x: ``(N,)``; float64, float32, bfloat16 or float16.
        offsets: ``(G + 1,)``; group ``g`` is ``x[offsets[g]:offsets[g + 1]]``. On CPU they are checked to run from 0
            to ``N``; on CUDA what they leave out of ``x`` is not read, and they are not checked.
        ids: instead of offsets, ``(N,)`` numbers of groups, in ``[0, num_groups)`` (see :func:`group_index`). On CUDA
            numbers outside that range belong to no group; on CPU they are an error.
        num_groups: ``G``, with ``ids``.
        valid: ``(N,)``, bool: False for items that do not count, whatever their value. By default all do.
        weights: ``(N,)``, how often each item counts; an item whose weight is not positive does not.

    Returns:
        :class:`SegmentStats` of five ``(G,)`` tensors. A NaN among a group's valid items makes its mean, m2, min and
        max NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; not exactly one of offsets and ids is given;
            on the CPU, offsets do not rise from 0 to N, or a number in ids is outside [0, num_groups).
        RuntimeError: a derivative is asked for.

    One launch on CUDA, without waiting for the device. Linear in ``N + G`` on CPU.

    Example:
        >>> import torch
        >>> from gradops.rl import segment_stats
        >>> s = segment_stats(torch.tensor([1.0, 3.0, 5.0]), offsets=torch.tensor([0, 2, 3]))
        >>> s.mean, s.m2
        (tensor([2., 5.], dtype=torch.float64), tensor([2., 0.], dtype=torch.float64))
    """
    check_floating(x, "x")
    if x.dim() != 1:
        raise ValueError(f"x must have 1 dimension, got shape {tuple(x.shape)}")
    if (offsets is None) == (ids is None):
        raise ValueError(f"exactly one of offsets and ids must be given, got {'none' if ids is None else 'both'}")
    if (num_groups is None) != (ids is None):
        raise ValueError("num_groups must be given with ids, and only with them")
    if num_groups is not None and num_groups < 0:
        raise ValueError(f"num_groups must not be negative, got {num_groups}")
    refuse_derivative("segment_stats", x=x, weights=weights)
    offsets = None if offsets is None else check_offsets(offsets, x)
    ids = None if ids is None else check_labels(ids, "ids", x, "x")
    valid = None if valid is None else check_column(valid, "valid", x, torch.bool, "x")
    weights = None if weights is None else check_column(weights, "weights", x, None, "x")
    return SegmentStats(*_op(x, offsets, ids, valid, weights, num_groups or 0).unbind(-2))


def merge_stats(a: SegmentStats, b: SegmentStats) -> SegmentStats:
    r"""The moments of two sets of items together, from those of each.

    .. math::
        n = n_a + n_b, \quad \delta = \mu_b - \mu_a, \quad \mu = \mu_a + \delta \frac{n_b}{n}, \quad
        M = M_a + M_b + \delta^2 \frac{n_a n_b}{n}

    Elementwise; a side without items leaves the other as it is. (Chan, Golub, LeVeque, 1979.)

    Example:
        >>> import torch
        >>> from gradops.rl import merge_stats, segment_stats
        >>> x, ends = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 3])
        >>> a = segment_stats(x[:1], offsets=ends.clamp(max=1))
        >>> b = segment_stats(x[1:], offsets=ends.clamp(max=2))
        >>> merge_stats(a, b).mean, segment_stats(x, offsets=ends).mean
        (tensor([3.], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    for name, s in (("a", a), ("b", b)):
        if not isinstance(s, SegmentStats):
            raise TypeError(f"{name} must be a SegmentStats, got {type(s).__name__}")
    if a.count.shape != b.count.shape:
        raise ValueError(f"a and b must have the same groups, got shapes {tuple(a.count.shape)} "
                         f"and {tuple(b.count.shape)}")
    count = a.count + b.count
    share = torch.where(count > 0, b.count / count, 0)
    delta = b.mean - a.mean
    mean = torch.where(a.count == 0, b.mean, torch.where(b.count == 0, a.mean, a.mean + delta * share))
    m2 = a.m2 + b.m2 + torch.where((a.count > 0) & (b.count > 0), delta * delta * a.count * share, 0)
    return SegmentStats(count, mean, m2, torch.minimum(a.min, b.min), torch.maximum(a.max, b.max))


def all_reduce_stats(stats: SegmentStats, group: Any = None) -> SegmentStats:
    """The moments over all ranks' items, the same bits on every rank.

    Args:
        stats: this rank's moments; every rank must have the same number of groups (empty ones are fine).
        group: the ``torch.distributed`` process group; None is the default one.

    All ranks' moments are gathered and merged in the order of the ranks (:func:`merge_stats`), on every rank alike.
    Sends ``5 G`` float64 per rank. Averaging the ranks' own variances instead, as training loops do, leaves out what
    the ranks' means differ by.
    """
    mine = torch.stack(tuple(stats))
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    total = SegmentStats(*parts[0])
    for part in parts[1:]:
        total = merge_stats(total, SegmentStats(*part))
    return total
