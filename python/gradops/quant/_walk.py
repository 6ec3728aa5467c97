"""The walk through the blocks of columns: the kernel of one block, and the product that carries on to the next."""
from typing import Any

import torch
from torch import Tensor

from .._op import _library, register
from ..linalg.newton_schulz import _matmul_precision
from ._columns import blocks


def _block_fake(w: Tensor, u: Tensor | None, original: Tensor | None, pull: Tensor | None, scale: Tensor | None,
                zero: Tensor | None, group: Tensor | None, unit: Tensor | None, group_size: int,
                *_: Any) -> tuple[Tensor, ...]:
    rows, cols = w.shape[:-1], w.shape[-1]
    groups = 0 if scale is not None else (cols + group_size - 1) // group_size

    def out(width: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return w.new_empty((*rows, width), dtype=dtype)

    return (out(cols, torch.uint8), out(cols), out(0 if u is None else cols), out(0 if pull is None else cols),
            out(groups), out(groups), w.new_empty(rows))


gptq_block = register("gptq_block", fake=_block_fake)
_spread_ = register("gptq_spread_", fake=lambda w, e, u, add: None, vmap=False)

_library.define(
    "gptq_columns(Tensor w, Tensor u, Tensor? pull, Tensor? scale, Tensor? zero, Tensor? group, Tensor? unit, "
    "int group_size, int block_size, bool fresh, int bits, bool symmetric, bool one_sided, float mse, int grid, "
    "int scale_type, float beta, bool pull_first, bool latent_rounded) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)  # fmt: skip


@torch.library.impl(_library, "gptq_columns", "CompositeExplicitAutograd")
def _gptq_columns(w: Tensor, u: Tensor, pull: Tensor | None, scale: Tensor | None, zero: Tensor | None,
                  group: Tensor | None, unit: Tensor | None, group_size: int, block_size: int, fresh: bool, bits: int,
                  symmetric: bool, one_sided: bool, mse: float, grid: int, scale_type: int, beta: float,
                  pull_first: bool, latent_rounded: bool) -> tuple[Tensor, ...]:
    lead, n = w.shape[:-2], w.shape[-1]

    def three(x: Tensor | None, keep: int = 2) -> Any:
        return None if x is None else x.reshape(lead.numel(), *x.shape[x.dim() - keep :])

    u, pull, scale, zero = three(u), three(pull), three(scale), three(zero)
    group, unit = three(group, 1), three(unit, 0)
    original = three(w) if beta != 0 else None
    w = three(w).clone(memory_format=torch.contiguous_format)  # becomes what compensation makes of it
    options = (bits, symmetric, one_sided, mse, grid, scale_type)
    given = scale is not None
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    codes, q = w.new_empty(w.shape, dtype=torch.uint8), torch.empty_like(w)
    loss = w.new_zeros(w.shape[:2])
    with _matmul_precision("highest"):  # no TensorFloat-32 or bfloat16 behind the name of float32
        for begin, end in blocks(n, group_size, block_size, fresh and not given):
            known: tuple[Tensor | None, ...] = (None, None, None)
            if given:
                known = (scale, zero, group[:, begin:end])
            elif not fresh or group_size > end - begin:
                first, last = -(-begin // group_size), -(-end // group_size)
                if first < last:  # groups that begin here
                    columns = w[:, :, first * group_size : min(last * group_size, n)]
                    found = gptq_block(columns, *(None,) * 6, unit, group_size, *options, 0.0, False, False)
                    scales.extend(found[4].split(1, -1))
                    zeros.extend(found[5].split(1, -1))
                low = begin // group_size
                places = torch.arange(begin, end, device=w.device) // group_size - low
                known = (torch.cat(scales[low:], -1), torch.cat(zeros[low:], -1), places.expand(len(w), end - begin))
            here, right = slice(begin, end), slice(end, n)
            codes[:, :, here], q[:, :, here], e, latent, s, z, part = gptq_block(
                w[:, :, here], u[:, here, here], None if original is None else original[:, :, here],
                None if pull is None else pull[:, here, here], *known, unit, group_size, *options, beta, pull_first,
                latent_rounded,
            )  # fmt: skip
            loss += part
            if known[0] is None:
                scales.extend(s.split(1, -1))
                zeros.extend(z.split(1, -1))
            if end < n:
                _carry(w[:, :, right], e, u[:, here, right], False)
                if pull is not None:
                    _carry(w[:, :, right], latent, pull[:, here, right], True)
    none = w.new_empty((*w.shape[:2], 0))
    parts = codes, q, loss, torch.cat([none, *scales], -1), torch.cat([none, *zeros], -1)
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in parts)


def _carry(w: Tensor, e: Tensor, u: Tensor, add: bool) -> None:
    if w.device.type == "cpu":
        _spread_(w, e, u, add)
    else:
        w.baddbmm_(e, u, alpha=1 if add else -1)


def _columns_fake(w: Tensor, u: Tensor, pull: Tensor | None, scale: Tensor | None, zero: Tensor | None,
                  group: Tensor | None, unit: Tensor | None, group_size: int, *_: Any) -> tuple[Tensor, ...]:
    groups = 0 if scale is not None else (w.shape[-1] + group_size - 1) // group_size
    found = w.new_empty((*w.shape[:-1], groups))
    return (w.new_empty(w.shape, dtype=torch.uint8), w.new_empty(w.shape), w.new_empty(w.shape[:-1]), found,
            torch.empty_like(found))


gptq_columns = register("gptq_columns", fake=_columns_fake)
