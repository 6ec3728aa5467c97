"""The blocks of a model, and how a calibration batch gets to one of them.

A block is an element of an outermost ModuleList that holds linear layers. To reach one, the model itself runs, with its
earlier blocks replaced by what they returned last: so whatever happens between blocks (masks, rotary embeddings,
arguments that differ from layer to layer) is the model's own doing, and only one output per batch is kept. That holds
if blocks are a chain, which `execution_order` checks on the first batch; a model that is none runs as one block.
"""
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._layers import is_layer


class Enough(BaseException):
    """The rest of the model need not run."""


def find_blocks(model: nn.Module, prefix: str = "") -> list[str]:
    """The names of the elements of outermost ModuleLists that hold layers; none: ``[]``."""
    names = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f"{prefix}{name}.{i}" for i, block in child.named_children()
                      if any(map(is_layer, block.modules()))]  # fmt: skip
        else:
            names += find_blocks(child, f"{prefix}{name}.")
    return names


def call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, Sequence) else model(batch)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (Mapping, tuple, list)):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(part)


class Stream:
    """Calibration batches on their way through the blocks: for each, what every ModuleList returned last."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], order: Sequence[str]) -> None:
        self.model, self.batches, self.order = model, batches, order
        self._lists = [name.rpartition(".")[0] for name in order]
        self._latest: list[dict[str, Any]] = [{} for _ in batches]

    def run(self, at: int, batch: int, *, block: nn.Module | None = None, keep: bool = False) -> list[Tensor]:
        """Runs block `at` on a batch, or `block` in its place, and keeps its output for the next one or not.
        Returns the tensors it was called with; none if the batch does not come by. A hook may raise `Enough`."""
        latest = self._latest[batch]
        inputs: list[Tensor] = []

        def forward(index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if index < at:
                return latest[self._lists[index]]
            if index > at:
                return original(*args, **kwargs)  # this batch goes another way
            inputs.extend(tensors((args, kwargs)))
            output = (block or original)(*args, **kwargs)
            if keep:
                latest[self._lists[index]] = output
            raise Enough

        table = {name: partial(forward, i) for i, name in enumerate(self.order)}
        with _forwards(self.model, table), suppress(Enough):
            call(self.model, self.batches[batch])
        return inputs


def execution_order(model: nn.Module, names: Sequence[str], batch: Any) -> list[str]:
    """The blocks in the order in which the batch meets them, or ``[""]``, the model as one block."""
    if not names:
        return [""]
    met: list[tuple[str, list[Tensor]]] = []

    def forward(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        met.append((name, _sizes(tensors((args, kwargs)))))
        return original(*args, **kwargs)

    with _forwards(model, {name: partial(forward, name) for name in names}):
        call(model, batch)
    order = [name for name, _ in met]
    stream = Stream(model, [batch], order)
    chain = len(set(order)) == len(order) and all(
        _same(sizes, _sizes(stream.run(i, 0, keep=True))) for i, (_, sizes) in enumerate(met)
    )
    if not chain:
        warnings.warn(f"the {len(names)} blocks {names[0]} to {names[-1]} are no chain, each fed by the one before: "
                      "the model runs as one block, every time from its beginning", stacklevel=3)  # fmt: skip
        return [""]
    return order


def _sizes(xs: Iterator[Tensor] | Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().norm().cpu() for x in xs]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-4, equal_nan=True) for x, y in zip(a, b, strict=True))


@contextmanager
def _forwards(model: nn.Module, table: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Other functions in the place of the forward of named modules; each gets the original as its first argument."""
    kept = []
    for name, function in table.items():
        module = model.get_submodule(name)
        kept.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = partial(function, module.forward)
    try:
        yield
    finally:
        for module, forward in reversed(kept):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
