"""The three ways to say how rewards fall into groups, and what is common to the functions that take them."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_integers, check_rising


def check_labels(labels: Any, name: str, rewards: Tensor, other: str = "rewards") -> Tensor:
    """int64 labels, one for each of rewards."""
    check_integers(labels, name)
    if labels.dim() != 1 or labels.shape[0] != rewards.shape[0]:
        raise ValueError(f"{name} must have one entry for each of {other}, shape ({rewards.shape[0]},), "
                         f"got {tuple(labels.shape)}")
    check_device(labels, name, rewards, other)
    return labels if labels.dtype == torch.int64 else labels.long()


def check_column(x: Any, name: str, rewards: Tensor, dtype: torch.dtype | None, other: str = "rewards") -> Tensor:
    """One entry for each of rewards; bool, or (dtype None) any real number, as float64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if dtype is None and (x.is_complex() or x.dtype == torch.bool):
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != rewards.shape[0]:
        raise ValueError(f"{name} must have one entry for each of {other}, shape ({rewards.shape[0]},), "
                         f"got {tuple(x.shape)}")
    check_device(x, name, rewards, other)
    return x if dtype is not None else x.double()


def check_offsets(offsets: Any, rewards: Tensor, name: str = "offsets") -> Tensor:
    check_integers(offsets, name)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must have shape (groups + 1,), got {tuple(offsets.shape)}")
    check_device(offsets, name, rewards, "rewards")
    return offsets if offsets.dtype == torch.int64 else offsets.long()


def grouping(rewards: Tensor, offsets: Any, ids: Any, group_size: int | None,
             ) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """(offsets, ids, second ids, group size) of exactly one way to group rewards along their first dimension."""
    if (offsets is not None) + (ids is not None) + (group_size is not None) != 1:
        given = [k for k, v in (("offsets", offsets), ("ids", ids), ("group_size", group_size)) if v is not None]
        raise ValueError("exactly one of offsets, ids and group_size must be given, got "
                         f"{' and '.join(given) or 'none'}")
    if offsets is not None:
        return check_offsets(offsets, rewards), None, None, 1
    if group_size is not None:
        if not isinstance(group_size, int) or group_size < 1 or rewards.shape[0] % group_size:
            raise ValueError(f"group_size must be a positive integer that divides the number of rewards, "
                             f"{rewards.shape[0]}, got {group_size!r}")
        return None, None, None, group_size
    if isinstance(ids, tuple | list):
        if len(ids) != 2:
            raise ValueError("ids must be a tensor or a pair of tensors (group_index makes one of strings), got "
                             f"{type(ids).__name__} of {len(ids)}")
        return None, check_labels(ids[0], "ids[0]", rewards), check_labels(ids[1], "ids[1]", rewards), 1
    return None, check_labels(ids, "ids", rewards), None, 1


def as_ids(rewards: Tensor, offsets: Tensor | None, ids: Tensor | None, group_size: int) -> Tensor:
    """Labels that group like the others."""
    if ids is not None:
        return ids
    n = rewards.shape[0]
    if offsets is None:
        return torch.arange(n, device=rewards.device) // group_size
    check_rising(offsets, "offsets", n)
    groups = torch.arange(offsets.shape[0] - 1, device=rewards.device)
    return torch.repeat_interleave(groups, offsets.diff(), output_size=n)


def runs(keys: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(order, run): a stable order that puts equal keys side by side, and the number of each place's run of them.
    No host sync."""
    n = keys[0].shape[0]
    order = torch.arange(n, device=keys[0].device)
    for key in reversed(keys):
        order = order[torch.sort(key[order], stable=True).indices]
    new = torch.zeros(n, dtype=torch.int64, device=order.device)
    for key in keys:
        sorted_key = key[order]
        new[1:] |= (sorted_key[1:] != sorted_key[:-1]).long()
    return order, new.cumsum(0)


def counts(keys: list[Tensor]) -> Tensor:
    """How many times each item's keys occur. No host sync."""
    order, run = runs(keys)
    size = torch.zeros_like(run).scatter_add_(0, run, torch.ones_like(run))
    return torch.empty_like(run).scatter_(0, order, size[run])
