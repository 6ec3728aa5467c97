"""Pytrees as one vector, and random vectors that are the same on every device."""
from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ._trees import Tree


def flat(v: Any, tree: Tree) -> Tensor:
    """One vector of the widest dtype of the leaves."""
    tensors = tree.vector(v, "the result of matvec")[0]
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return torch.cat([t.reshape(-1).to(dtype) for t in tensors])


def unflat(x: Tensor, tree: Tree, *, stacked: bool = False) -> Any:
    """The pytree of a vector, or of the rows of a matrix along a first axis."""
    parts = x.split([t.numel() for t in tree.tensors], -1)
    head = x.shape[:1] if stacked else ()
    return tree.build([p.reshape(*head, *t.shape).to(t.dtype) for p, t in zip(parts, tree.tensors, strict=True)])


def gaussian(tree: Tree, generator: torch.Generator | None) -> Tensor:
    size, dtype = sum(t.numel() for t in tree.tensors), reduce(torch.promote_types, (t.dtype for t in tree.tensors))
    device = tree.tensors[0].device
    return torch.randn(size, dtype=torch.promote_types(dtype, torch.float32), generator=generator,
                       device=device if generator is None else generator.device).to(device, dtype)


def rademacher(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Signs, +1 or -1, in the shape of t."""
    device = t.device if generator is None else generator.device
    return torch.randint(2, t.shape, generator=generator, device=device).mul_(2).sub_(1).to(t)
