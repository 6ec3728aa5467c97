"""What gptq_quantize, rtn_quantize and their plain twins share: the result, the checks, the order of the columns."""
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_matrix, check_one_of
from .._op import register

GRIDS = ("int", "nvfp4", "mxfp4")
METHODS = ("gptq", "gptaq", "foem", "foem+gptaq")
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_BLOCK = 128

_prefer_huge_pages = register("prefer_huge_pages", fake=lambda x: None, vmap=False)


class QuantizedWeight(NamedTuple):
    """A weight ``(..., out, in)`` on a grid: ``weight[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])`` with
    ``g = g_idx[i]``; on the FP4 grids a code is a sign bit over an index into 0, .5, 1, 1.5, 2, 3, 4, 6.

    codes: ``(..., out, in)``, uint8. scales, zeros: ``(..., out, groups)``, float32. g_idx: ``(..., in)``, int32, the
    group of each input. weight: what the codes stand for, in the dtype that was quantised. loss: ``(..., out)``,
    float32. info: ``(...)``, int32: 0, ``-k`` if ``k`` inputs were never seen, or, if positive, why the
    item was rounded to nearest instead (see :func:`gptq_quantize`).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    weight: Tensor
    loss: Tensor
    info: Tensor


def check_grid(W: Tensor, bits: int, group_size: int, mse: float, grid: str, scale_dtype: torch.dtype) -> int:
    """Checks what both functions take; the number of columns in a group."""
    check_matrix(W, "W")
    check_one_of(grid, "grid", GRIDS)
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise ValueError(f"bits must be 2 to 8, got {bits!r}")
    if grid != "int" and bits != 4:
        raise ValueError(f"grid={grid!r} has 4 bits, got bits={bits}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size must be positive, or -1 for whole rows, got {group_size}")
    if not mse >= 0:
        raise ValueError(f"mse must be 0 or the exponent of the error, got {mse}")
    check_one_of(scale_dtype, "scale_dtype", SCALE_DTYPES)
    return max(1, W.shape[-1] if group_size == -1 else min(group_size, W.shape[-1]))


def check_scales(W: Tensor, scales: Tensor | None, zeros: Tensor | None, group: int) -> None:
    if scales is None and zeros is not None:
        raise ValueError("zeros go with scales, got zeros without scales")
    want = (*W.shape[:-1], -(-W.shape[-1] // group))
    for x, name in ((scales, "scales"), (zeros, "zeros")):
        if x is None:
            continue
        check_floating(x, name)
        check_device(x, name, W, "W")
        if tuple(x.shape) != want:
            raise ValueError(f"{name} must have shape (..., out, groups) = {want}, got {tuple(x.shape)}")


def check_square(x: Tensor, name: str, W: Tensor) -> None:
    check_matrix(x, name)
    check_device(x, name, W, "W")
    n = W.shape[-1]
    want = (n, n) if x.dim() == 2 else (*W.shape[:-2], n, n)
    if x.dim() != len(want) or tuple(x.shape) != want:
        raise ValueError(f"{name} must have shape (..., in, in) = {(*W.shape[:-2], n, n)} or {(n, n)}, "
                         f"got {tuple(x.shape)}")


def column_order(diagonal: Tensor, group: int, desc_act: bool, act_group_aware: bool) -> Tensor | None:
    """The order in which columns are quantised, (items, in); None: as they are."""
    n = diagonal.shape[-1]
    if desc_act:
        return diagonal.argsort(dim=-1, descending=True, stable=True)
    if not act_group_aware:
        return None
    # The largest first inside each group, and the groups by their largest; a shorter last group stays last.
    full = n // group
    parts = diagonal[..., : full * group].unflatten(-1, (full, group))
    inner = parts.argsort(dim=-1, descending=True, stable=True)
    groups = parts.amax(-1).argsort(dim=-1, descending=True, stable=True)
    places = inner + torch.arange(full, device=diagonal.device)[:, None] * group
    places = places.take_along_dim(groups[..., None].expand(*groups.shape, group), -2).flatten(-2)
    tail = torch.arange(full * group, n, device=diagonal.device).expand(*diagonal.shape[:-1], n - full * group)
    return torch.cat([places, tail], -1)


def blocks(n: int, group: int, block_size: int, whole_groups: bool) -> list[tuple[int, int]]:
    """Where blocks begin and end. With `whole_groups`, a block is several groups, or a part of one."""
    if not whole_groups:
        return [(i, min(i + block_size, n)) for i in range(0, n, block_size)]
    if group <= block_size:
        step = block_size // group * group
        return [(i, min(i + step, n)) for i in range(0, n, step)]
    return [(i, min(i + block_size, g + group, n)) for g in range(0, n, group)
            for i in range(g, min(g + group, n), block_size)]


def groups_known_until(begin: int, end: int, n: int, group: int, fresh: bool) -> int:
    """The columns that have to be current when a block begins, for the scales of groups that begin in it."""
    if fresh and group <= end - begin:
        return end  # one group at a time, within the block
    last = -(-end // group)
    return max(end, min(last * group, n)) if -(-begin // group) < last else end


def one_block_ahead(n: int, group: int, block_size: int, fresh: bool) -> bool:
    """Whether no scale needs columns beyond its block; before the first, all columns are as given."""
    return all(groups_known_until(begin, end, n, group, fresh) == end
               for begin, end in blocks(n, group, block_size, fresh) if begin > 0)


def items_together(x: Tensor) -> int:
    """How many items of a batch to take at a time: on the CPU, as many as keep the threads busy within the caches."""
    if x.device.type != "cpu":
        return max(1, len(x))
    return max(torch.get_num_threads(), 2**23 // max(1, x[:1].nbytes))


def may_hold(mask: Tensor) -> bool:
    """False where no element is set and that is known without waiting for a device. Within ops only: it branches."""
    return mask.device.type != "cpu" or bool(mask.any())


def fresh_like(x: Tensor) -> Tensor:
    """An empty contiguous tensor like x. On the CPU, first use of large memory costs several times what it should in
    pages of 4096 bytes."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.device.type == "cpu":
        _prefer_huge_pages(out)
    return out


def nvfp4_unit(W: Tensor) -> Tensor:
    """The number, one per item, whose E4M3 multiples are the scales of NVFP4: the largest weight gets the largest."""
    unit = W.abs().flatten(-2).amax(-1) / (6 * 448)
    return torch.where(unit > 0, unit, 1)
