"""The kernel of one block of columns; `gptq_columns` walks through the blocks."""
from typing import Any

import torch
from torch import Tensor

from .._op import register


def _fake(w: Tensor, u: Tensor | None, original: Tensor | None, pull: Tensor | None, scale: Tensor | None,
          zero: Tensor | None, group: Tensor | None, unit: Tensor | None, group_size: int,
          *_: Any) -> tuple[Tensor, ...]:
    rows, cols = w.shape[:-1], w.shape[-1]
    groups = 0 if scale is not None else (cols + group_size - 1) // group_size

    def out(width: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return w.new_empty((*rows, width), dtype=dtype)

    return (out(cols, torch.uint8), out(cols), out(0 if u is None else cols), out(0 if pull is None else cols),
            out(groups), out(groups), w.new_empty(rows))


gptq_block_ = register("gptq_block_", fake=lambda *_: None, vmap=False)  # the same, into tensors of the caller's
gptq_block = register("gptq_block", fake=_fake)
