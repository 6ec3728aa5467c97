"""One call of every registered op, family by family; tests/test_op.py runs the promises of registration over them."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def matrices() -> Tensor:
    return torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gram(x: Tensor) -> Tensor:
    """x x^T for an op's input: in x's dtype, also where the op is called under autocast."""
    with torch.autocast("cpu", enabled=False):
        return x @ x.mT


@dataclass(frozen=True)
class Call:
    """Both take one float64 tensor, of any numbers: what `example` returns, or a part or a multiple of it.

    raw: the arguments of the raw op. public: the public function around it, returning one tensor; None for an op that
    only stands behind the derivatives of another.
    derivatives: how often `public` can be differentiated in the tensor; with 0 it must raise instead.
    own_bits: every number is computed by kernels of ours, so that threads cannot change a bit.
    vmap: False for an op on ragged groups, which has no batch dimension to put in front.
    floating: False for an op on integers, of which nobody can ask a derivative.
    """

    raw: Callable[[Tensor], tuple[Any, ...]]
    public: Callable[[Tensor], Tensor] | None
    example: Callable[[], Tensor] = matrices
    large: Callable[[], Tensor] = lambda: torch.randn(3, 300, 257, generator=torch.Generator().manual_seed(1))
    derivatives: int = 2
    own_bits: bool = True
    vmap: bool = True
    floating: bool = True
