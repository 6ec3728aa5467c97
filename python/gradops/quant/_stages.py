"""Which layers of a block share an input, and in which order they can be quantised."""
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._blocks import Stream


def address(x: Tensor) -> tuple[Any, ...]:
    """What two tensors share if and only if they hold the same numbers in the same memory, while both are alive."""
    return x.data_ptr(), x.shape, x.stride(), x._version


@contextmanager
def listening(layers: Mapping[str, nn.Module], heard: Callable[[str, Tensor], None],
              answer: Callable[[str, Tensor], Tensor] | None = None) -> Iterator[None]:  # fmt: skip
    """Tells `heard` what each layer is called with; `answer`, if given, takes the place of what it returns."""
    handles = []
    for name, layer in layers.items():

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            heard(name, args[0] if args else kwargs["input"])

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if answer is not None:
            handles.append(layer.register_forward_hook(lambda m, args, y, name=name: answer(name, y)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Group(NamedTuple):
    """Layers with one input, and how many different ones they get in a batch."""

    names: list[str]
    calls: int


def find_stages(stream: Stream, at: int, layers: Mapping[str, nn.Module]) -> list[list[Group]]:
    """Stages of groups of layers; no stage depends on a later one. Layers that no batch reaches are in none.

    Which layer feeds which is read off the autograd graph of a batch, in which the output of every layer is a leaf;
    batches are taken until every layer was met, which for all but experts is one.
    """
    level: dict[str, int] = {}
    inputs: dict[str, set[Any]] = defaultdict(set)
    for batch in range(len(stream.batches)):
        leaves: dict[int, tuple[str, Tensor]] = {}
        alive: list[Tensor] = []  # so that no address is used twice

        def heard(name: str, x: Tensor, batch: int = batch, leaves: Any = leaves, alive: Any = alive) -> None:
            if x.numel():
                alive.append(x)
                inputs[name].add((batch, *address(x)))
                before = [level[leaves[node][0]] for node in _leaves(x, leaves)]
                level[name] = max(level.get(name, 0), 1 + max(before, default=-1))

        def answer(name: str, y: Tensor, leaves: Any = leaves) -> Tensor:
            if name not in level:
                return y
            leaf = y.detach().requires_grad_()
            leaves[id(leaf)] = name, leaf
            return leaf.clone()  # a leaf must not be changed in place, and some models do

        with torch.enable_grad(), listening(layers, heard, answer):
            stream.run(at, batch)
        if len(level) == len(layers):
            break
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in layers:
        if name in level:
            groups[level[name], frozenset(inputs[name])].append(name)
    stages: dict[int, list[Group]] = defaultdict(list)
    for (depth, heard_by_all), names in groups.items():
        stages[depth].append(Group(names, max(Counter(batch for batch, *_ in heard_by_all).values())))
    return [stages[depth] for depth in sorted(stages)]


def _leaves(x: Tensor, leaves: Collection[int]) -> set[int]:
    """Which of these leaves `x` was made from."""
    found, stack, seen = set(), [x.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        stack += [function for function, _ in node.next_functions]
    return found & set(leaves)
