"""The work of linear_cross_entropy and linear_ce_ggnvp: products of a few rows with the weight, and the kernels of
cross-entropy on them. Tensors may have the same batch dimensions in front, whose items are done one by one."""
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..linalg.wide_matmul import wide_matmul_
from ..rl.linear_chunks import _chunks, _wide

# A chunk of rows reads and writes all of the gradient of the weight, which asks for many; its logits are the memory
# that is used, which asks for few.
_ROWS = {"cpu": 256, "cuda": 1024}
HIDDEN, WEIGHT, BIAS = 1, 2, 4  # whose gradients are wanted

Maybe = Tensor | None
_kernels = torch.ops.gradops


def _gradients(hidden: Tensor, weight: Tensor, wanted: int) -> list[Tensor]:
    """Memory for those that are wanted, in float32 or wider, and nothing for the others."""
    batch, wide = hidden.shape[:-2], _wide(hidden.dtype)
    shapes = hidden.shape, weight.shape, weight.shape[:-1]
    return [hidden.new_empty(shape if wanted >> i & 1 else (*batch, 0), dtype=wide) for i, shape in enumerate(shapes)]


def _of(t: Tensor, rows: slice) -> Tensor:
    """t[rows]; where that is all of t, without the time of making it, which adds up for small problems."""
    return t if rows.stop - rows.start == t.shape[0] else t[rows]


def _items(batch: tuple[int, ...], *tensors: Maybe) -> Iterator[list[Any]]:
    if not batch:
        yield list(tensors)
        return
    for i in product(*map(range, batch)):
        yield [None if t is None else t[i] for t in tensors]


class _Sums:
    """The gradients of hidden, weight and bias, to which every chunk adds its part."""

    def __init__(self, wanted: int, hidden: Any, weight: Any, bias: Any = None) -> None:
        self.wanted, self.hidden, self.weight, self.bias = wanted, hidden, weight, bias

    def add_bias(self, rows: slice, dz: Tensor) -> None:
        if self.wanted & BIAS:
            torch.sum(dz, 0, out=self.bias) if rows.start == 0 else self.bias.add_(dz.sum(0))

    def add_hidden(self, rows: slice, dz: Tensor, weight: Maybe, more: bool = False) -> None:
        """With `more`, a further part of these rows."""
        if self.wanted & HIDDEN and weight is not None:
            wide_matmul_(_of(self.hidden, rows), dz, weight, add=more)

    def add_weight(self, rows: slice, dz: Tensor, hidden: Tensor) -> None:
        if self.wanted & WEIGHT:
            wide_matmul_(self.weight, dz.mT, hidden, add=rows.start > 0)


def _memory(hidden: Tensor, weight: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
    """A chunk of rows after the other, with `count` matrices for their logits in memory of the one before."""
    n, v = len(hidden), len(weight)
    size = min(_ROWS[hidden.device.type], max(n // 4, 64))
    memory = hidden.new_empty(count * min(n, size), v, dtype=_wide(hidden.dtype))
    for rows in _chunks(n, size):
        yield rows, _of(memory, slice(0, count * (rows.stop - rows.start)))


def _logits(both: Tensor, rows: slice, hidden: Tensor, weight: Tensor, bias: Maybe, hidden_dot: Maybe,
            weight_dot: Maybe, bias_dot: Maybe) -> tuple[Tensor, Tensor]:
    """Logits and below them, if there is room, their change; of both, products with the weight are one."""
    n = rows.stop - rows.start
    z, u = both[:n], both[n:]
    if hidden_dot is None:
        wide_matmul_(z, _of(hidden, rows), weight.mT)
        if weight_dot is None:
            u.zero_()
    else:
        wide_matmul_(both, torch.cat([hidden[rows], hidden_dot[rows]]), weight.mT)
    if weight_dot is not None:
        wide_matmul_(u, _of(hidden, rows), weight_dot.mT, add=hidden_dot is not None)
    if bias is not None:
        z += bias
    if bias_dot is not None:
        u += bias_dot
    return z, u


def _for_products(dz: Tensor, hidden: Tensor) -> Tensor:
    """Products on CUDA take both of one dtype: rounded once for all of them."""
    return dz.to(hidden.dtype) if dz.is_cuda else dz


def outputs(hidden, weight, bias, target, lse, g, hidden_dot, weight_dot, bias_dot, g_dot, ignore_index,
            label_smoothing, wanted, wanted_dot):
    """The memory for what `sweep` returns."""
    moves = any(t is not None for t in (hidden_dot, weight_dot, bias_dot))
    rows, none = hidden.shape[:-1], (*hidden.shape[:-2], 0)
    numbers = [hidden.new_empty(rows if there else none, dtype=torch.float64)
               for there in (lse is None, lse is None, moves, moves)]
    return (*numbers[:2], *_gradients(hidden, weight, wanted), *numbers[2:], *_gradients(hidden, weight, wanted_dot))


def sweep(hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, lse: Maybe, g: Maybe, hidden_dot: Maybe,
          weight_dot: Maybe, bias_dot: Maybe, g_dot: Maybe, ignore_index: int, label_smoothing: float, wanted: int,
          wanted_dot: int) -> tuple[Tensor, ...]:
    """Loss, lse and the gradients along g; the changes of all these. Each chunk is visited once.

    `lse`: if it is known, which saves it and the loss. `wanted`, `wanted_dot`: which gradients, and which changes of
    gradients. What is not asked for has no elements."""
    out = outputs(hidden, weight, bias, target, lse, g, hidden_dot, weight_dot, bias_dot, g_dot, ignore_index,
                  label_smoothing, wanted, wanted_dot)
    for item in _items(hidden.shape[:-2], hidden, weight, bias, target, lse, g, hidden_dot, weight_dot, bias_dot, g_dot,
                       *out):
        _sweep((ignore_index, label_smoothing), wanted, wanted_dot, item[10:], *item[:10])
    return out


def _sweep(options: tuple[int, float], wanted: int, wanted_dot: int, out: list[Tensor], hidden: Tensor, weight: Tensor,
           bias: Maybe, target: Tensor, lse: Maybe, g: Maybe, hidden_dot: Maybe, weight_dot: Maybe, bias_dot: Maybe,
           g_dot: Maybe) -> None:
    loss, new_lse, *gradients = out[:5]
    loss_dot, lse_dot, *changes = out[5:]
    dots = hidden_dot, weight_dot, bias_dot
    moves = any(t is not None for t in dots)
    first, second = _Sums(wanted, *gradients), _Sums(wanted_dot, *changes)
    for rows, both in _memory(hidden, weight, 2 if moves else 1):
        z, u = _logits(both, rows, hidden, weight, bias, *dots)
        at = _of(target, rows)
        if lse is None:
            loss[rows], new_lse[rows] = _kernels.cross_entropy(z, at, *options)
        known, row_g, row_g_dot = (None if t is None else _of(t, rows)
                                   for t in (new_lse if lse is None else lse, g, g_dot))
        if moves:
            loss_dot[rows], lse_dot[rows] = _kernels.cross_entropy_jvp(z, at, u, known, *options)
        if wanted_dot:  # u becomes the change of the gradient
            _kernels.cross_entropy_backward_jvp_(z, at, u, known, lse_dot[rows], row_g, row_g_dot, *options)
            second.add_bias(rows, u)
        if wanted or wanted_dot:  # and z the gradient
            _kernels.cross_entropy_backward_(z, at, known, row_g, *options)
            first.add_bias(rows, z)
            both = _for_products(both, hidden)
            z, u = both.tensor_split([len(z)])
        first.add_hidden(rows, z, weight)
        first.add_weight(rows, z, _of(hidden, rows))
        second.add_hidden(rows, u, weight)
        second.add_hidden(rows, z, weight_dot, more=True)
        if hidden_dot is None:
            second.add_weight(rows, u, _of(hidden, rows))
        else:
            second.add_weight(rows, both, torch.cat([hidden_dot[rows], hidden[rows]]))


def ggn_outputs(hidden, weight, hidden_dot, weight_dot, scale):
    d_hidden, d_weight, _ = _gradients(hidden, weight, HIDDEN | WEIGHT)
    return d_hidden, d_weight


def ggn(hidden: Tensor, weight: Tensor, hidden_dot: Maybe, weight_dot: Maybe, scale: Tensor) -> tuple[Tensor, Tensor]:
    """J' diag(scale) H J of the logits, for changes of hidden and weight."""
    out = ggn_outputs(hidden, weight, hidden_dot, weight_dot, scale)
    for h, w, h_dot, w_dot, c, *item in _items(hidden.shape[:-2], hidden, weight, hidden_dot, weight_dot, scale, *out):
        sums = _Sums(HIDDEN | WEIGHT, *item)
        for rows, both in _memory(h, w, 2):
            z, u = _logits(both, rows, h, w, None, h_dot, w_dot, None)
            _kernels.softmax_ce_hvp_out(z, u, c[rows], u)
            u = _for_products(u, h)
            sums.add_hidden(rows, u, w)
            sums.add_weight(rows, u, _of(h, rows))
    return out
