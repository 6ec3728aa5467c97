"""A matrix with many columns, given whole or as a list of blocks of its columns."""
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._checks import check_device, check_floating, check_matrix

Blocks = Tensor | Sequence[Tensor]


def check_blocks(J: Any, name: str) -> list[Tensor]:
    """J must be a matrix (..., B, P), or a list of such that agree in all but P; always given back as a list."""
    if not isinstance(J, (list, tuple)):
        check_matrix(J, name)
        return [J]
    if not J:
        raise ValueError(f"{name} must hold at least one block, got an empty {type(J).__name__}")
    for i, x in enumerate(J):
        check_matrix(x, f"{name}[{i}]")
        if x.shape[:-1] != J[0].shape[:-1]:
            raise ValueError(f"{name}[{i}] must have the shape of {name}[0] but for the last dimension, "
                             f"{tuple(J[0].shape[:-1])}, got {tuple(x.shape[:-1])}")
        check_device(x, f"{name}[{i}]", J[0], f"{name}[0]")
    return list(J)


def check_rows(x: Any, name: str, blocks: list[Tensor]) -> None:
    """x must have one number for each row of the blocks."""
    check_floating(x, name)
    if x.shape != blocks[0].shape[:-1]:
        raise ValueError(f"{name} must have the shape of J less the last dimension, {tuple(blocks[0].shape[:-1])}, "
                         f"got {tuple(x.shape)}")
    check_device(x, name, blocks[0], "J")
