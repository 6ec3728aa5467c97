"""The sums over the inputs of a stage's layers, and the weights that follow from them."""
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._blocks import Enough, Stream
from ._columns import QuantizedWeight, column_order
from ._layers import weight_of
from ._stages import Group, address, listening
from .config import QuantizeConfig
from .gptq_quantize import _in_order, gptq_quantize
from .hessian_factor import hessian_factor
from .hessian_update import gptaq_cross_update_, hessian_update_


class Sums:
    """H and, for GPTAQ, D of a group of layers with one input; `seen` tokens."""

    def __init__(self, layer: nn.Module, cross: bool) -> None:
        weight = weight_of(layer)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.H = torch.zeros(weight.shape[1], weight.shape[1], dtype=dtype, device=weight.device)
        self.D = torch.zeros_like(self.H) if cross else None
        self.seen = 0

    def add(self, x: Tensor, mask: Tensor | None, exact: Tensor | None) -> None:
        mask = _fitting(mask, x)
        if exact is None:
            self.D = None  # no counterpart in the full-precision model
        if self.D is not None and exact is not None:
            gptaq_cross_update_(self.D, exact, x, self.seen, mask=mask)
        self.seen = int(hessian_update_(self.H, x, self.seen, mask=mask))


def calibrate(stream: Stream, at: int, groups: Sequence[Group], layers: Mapping[str, nn.Module],
              exact: Stream | None, twin: nn.Module | None, twins: Mapping[str, nn.Module]) -> list[Sums]:
    """Runs all batches through a block, as far as these groups of its layers need; the sums over their inputs."""
    found = [Sums(layers[group.names[0]], exact is not None) for group in groups]
    place = {name: i for i, group in enumerate(groups) for name in group.names}
    for batch in range(len(stream.batches)):
        mask = _mask(stream.batches[batch])
        counterparts: dict[int, list[Tensor]] = defaultdict(list)
        whole: set[int] = set()
        if exact is not None:
            take = lambda i, x, counterparts=counterparts: counterparts[i].append(x.clone())
            with listening({name: twins[name] for name in place}, _Once(groups, place, take)):
                whole = _tokens(exact.run(at, batch, block=twin))

        def add(i: int, x: Tensor, mask: Any = mask, counterparts: Any = counterparts, whole: set[int] = whole) -> None:
            other = counterparts[i].pop(0) if counterparts[i] else None
            # Experts see the tokens that are sent to them; in full precision those are others.
            if other is not None and (other.shape != x.shape or x.shape[:-1].numel() not in whole):
                other = None
            found[i].add(x, mask, other)

        with listening({name: layers[name] for name in place}, _Once(groups, place, add)):
            stream.run(at, batch)
    return found


class _Once:
    """Passes on every different input of every group of a batch, and ends the batch when all of them came by."""

    def __init__(self, groups: Sequence[Group], place: Mapping[str, int], take: Callable[[int, Tensor], Any]) -> None:
        self.place, self.take = place, take
        self.calls = [group.calls for group in groups]
        self.known: dict[Any, Tensor] = {}  # kept alive so that no address is used twice

    def __call__(self, name: str, x: Tensor) -> None:
        i = self.place[name]
        key = i, *address(x)
        if key in self.known or not x.numel():
            return
        self.known[key] = x
        self.take(i, x)
        self.calls[i] -= 1
        if max(self.calls) <= 0:
            raise Enough


class Solved(NamedTuple):
    weight: QuantizedWeight
    damp: float
    info: int


def solve(weights: Tensor, sums: Sequence[Sums], config: QuantizeConfig) -> list[Solved]:
    """Quantises weights (items, out, in), each with its sums, in one call."""
    h = torch.stack([s.H for s in sums]) if len(sums) > 1 else sums[0].H[None]
    diagonal = h.diagonal(0, -2, -1)
    group = h.shape[-1] if config.group_size == -1 else min(config.group_size, h.shape[-1])
    order = column_order(diagonal + (diagonal == 0), group, config.desc_act, config.act_group_aware)
    factor, damp, info = hessian_factor(_in_order(h, order), damp_percent=config.damp_percent,
                                        damp_auto_increment=config.damp_auto_increment)  # fmt: skip
    method, d = config.method, None
    if method.endswith("gptaq") and all(s.D is not None for s in sums):
        d = torch.stack([s.D for s in sums if s.D is not None])
    elif method.endswith("gptaq"):
        method = "foem" if method.startswith("foem") else "gptq"
    q = gptq_quantize(
        weights, h, bits=config.bits, group_size=config.group_size, sym=config.sym, desc_act=config.desc_act,
        static_groups=config.static_groups, act_group_aware=config.act_group_aware, mse=config.mse, method=method,
        alpha=config.alpha, beta=config.beta, D=d, factor=factor, scale_dtype=torch.float16,
    )  # fmt: skip
    return [Solved(QuantizedWeight(*(x[i] for x in q)), float(damp[i]), int(info[i])) for i in range(len(sums))]


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask for inputs laid out as it is, or flattened; None for others."""
    if mask is None or (x.shape[:-1] != mask.shape and x.shape[:-1] != (mask.numel(),)):
        return None
    return mask.to(x.device).reshape(x.shape[:-1])


def _tokens(inputs: Sequence[Tensor]) -> set[int]:
    """How many tokens a block may have been called with: tokens are rows of numbers, or integers."""
    return {x.shape[:-1].numel() if x.is_floating_point() else x.numel() for x in inputs}
