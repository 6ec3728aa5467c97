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


def _items(batch: tuple[int, ...], *tensors: Any) -> Iterator[list[Any]]:
    for i in product(*map(range, batch)):
        yield [None if t is None else t[i] for t in tensors]


class _Sums:
    """The gradients of hidden, weight and bias, to which every chunk adds its part."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor, wanted: int) -> None:
        self.hidden, self.weight, self.bias, self.wanted = hidden, weight, bias, wanted

    def add(self, rows: slice, dz: Tensor, hidden: Maybe, weight: Maybe, more: bool = False) -> None:
        """The products of dz with these; with `more`, to the rows' products so far."""
        if self.wanted & BIAS and not more:
            part = dz.sum(0)
            self.bias.copy_(part) if rows.start == 0 else self.bias.add_(part)
        if dz.is_cuda and (hidden is not None or weight is not None):
            dz = dz.to((weight if hidden is None else hidden).dtype)  # once for both products
        if self.wanted & HIDDEN and weight is not None:
            wide_matmul_(self.hidden[rows], dz, weight, add=more)
        if self.wanted & WEIGHT and hidden is not None:
            wide_matmul_(self.weight, dz.mT, hidden[rows], add=more or rows.start > 0)


def _memory(hidden: Tensor, weight: Tensor, count: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """A chunk of rows after the other, with `count` matrices for their logits in memory of the one before."""
    n = len(hidden)
    size = min(_ROWS[hidden.device.type], max(n // 4, 64))
    memory = [hidden.new_empty(min(n, size), len(weight), dtype=_wide(hidden.dtype)) for _ in range(count)]
    for rows in _chunks(n, size):
        yield rows, [m[:rows.stop - rows.start] for m in memory]


def _logits(z: Tensor, rows: slice, hidden: Tensor, weight: Tensor, bias: Maybe) -> None:
    wide_matmul_(z, hidden[rows], weight.mT)
    if bias is not None:
        z += bias


def _change(u: Tensor, rows: slice, hidden: Tensor, weight: Tensor, hidden_dot: Maybe, weight_dot: Maybe,
            bias_dot: Maybe) -> None:
    if hidden_dot is not None:
        wide_matmul_(u, hidden_dot[rows], weight.mT)
    if weight_dot is not None:
        wide_matmul_(u, hidden[rows], weight_dot.mT, add=hidden_dot is not None)
    if hidden_dot is None and weight_dot is None:
        u.zero_()
    if bias_dot is not None:
        u += bias_dot


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
        _sweep(*item[:10], ignore_index, label_smoothing, wanted, wanted_dot, item[10:])
    return out


def _sweep(hidden: Tensor, weight: Tensor, bias: Maybe, target: Tensor, lse: Maybe, g: Maybe, hidden_dot: Maybe,
           weight_dot: Maybe, bias_dot: Maybe, g_dot: Maybe, ignore_index: int, label_smoothing: float, wanted: int,
           wanted_dot: int, out: list[Tensor]) -> None:
    loss, new_lse, *gradients = out[:5]
    loss_dot, lse_dot, *changes = out[5:]
    dots = hidden_dot, weight_dot, bias_dot
    moves = any(t is not None for t in dots)
    first, second = _Sums(*gradients, wanted), _Sums(*changes, wanted_dot)
    options = ignore_index, label_smoothing
    for rows, (z, *more) in _memory(hidden, weight, 2 if moves else 1):
        _logits(z, rows, hidden, weight, bias)
        if lse is None:
            loss[rows], new_lse[rows] = _kernels.softmax_ce(z, target[rows], *options)
        known = (new_lse if lse is None else lse)[rows]
        row_g = None if g is None else g[rows]
        if moves:
            u = more[0]
            _change(u, rows, hidden, weight, *dots)
            loss_dot[rows], lse_dot[rows] = _kernels.softmax_ce_jvp(z, target[rows], u, known, *options)
            if wanted_dot:
                row_g_dot = None if g_dot is None else g_dot[rows]
                _kernels.softmax_ce_backward_jvp_(z, target[rows], u, known, lse_dot[rows], row_g, row_g_dot, *options)
        if wanted or (wanted_dot and moves):
            dz = z
            _kernels.softmax_ce_backward_(dz, target[rows], known, row_g, *options)
        if wanted:
            first.add(rows, dz, hidden, weight)
        if wanted_dot:
            second.add(rows, u, hidden, weight)
            second.add(rows, dz, hidden_dot, weight_dot, more=True)


def ggn_outputs(hidden, weight, hidden_dot, weight_dot, scale):
    return tuple(_gradients(hidden, weight, HIDDEN | WEIGHT)[:2])


def ggn(hidden: Tensor, weight: Tensor, hidden_dot: Maybe, weight_dot: Maybe, scale: Tensor) -> tuple[Tensor, Tensor]:
    """J' diag(scale) H J of the logits, for changes of hidden and weight."""
    out = ggn_outputs(hidden, weight, hidden_dot, weight_dot, scale)
    for h, w, h_dot, w_dot, c, *item in _items(hidden.shape[:-2], hidden, weight, hidden_dot, weight_dot, scale, *out):
        sums = _Sums(*item, item[0], HIDDEN | WEIGHT)
        for rows, (z, u) in _memory(h, w, 2):
            _logits(z, rows, h, w, None)
            _change(u, rows, h, w, h_dot, w_dot, None)
            _kernels.softmax_ce_hvp_out(z, u, c[rows], u)
            sums.add(rows, u, h, w)
    return out
