"""Parameters and vectors as users hold them: a tensor, or dicts, lists and tuples of tensors."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._checks import check_floating
from .._op import refuse_derivative


class Tree:
    """A pytree of real tensors, flattened; `names` are what errors call its leaves."""

    def __init__(self, tree: Any, name: str) -> None:
        pairs, self.spec = pytree.tree_flatten_with_path(tree)
        self.paths = [pytree.keystr(path) for path, _ in pairs]
        self.names = [name + path for path in self.paths]
        self.tensors: list[Tensor] = [t for _, t in pairs]
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("products are made of autograd's own calls and must be taken outside of torch.func "
                               "transforms (grad, jvp, vmap)")
        if not pairs:
            raise ValueError(f"{name} must hold at least one tensor, got {tree!r}")
        seen: dict[int, str] = {}
        for t, leaf in zip(self.tensors, self.names, strict=True):
            check_floating(t, leaf)
            if id(t) in seen:
                raise ValueError(f"{leaf} is the same tensor as {seen[id(t)]}: give a shared parameter once, as "
                                 "named_parameters() does")
            seen[id(t)] = leaf

    def build(self, tensors: list[Any]) -> Any:
        return pytree.tree_unflatten(tensors, self.spec)

    def vector(self, v: Any, name: str = "v", *, stacked: bool = False) -> tuple[list[Tensor], int | None]:
        """The leaves of a vector of the shape of this tree, and k if it is `stacked`: k vectors along a new first
        axis of every leaf."""
        given, spec = pytree.tree_flatten(v)
        if spec != self.spec:  # of dicts the order may be another
            given = self._by_path(v, name)
        count: int | None = None
        vectors = []
        for i, (t, path, p, own) in enumerate(zip(given, self.paths, self.tensors, self.names, strict=True)):
            leaf = name + path
            check_floating(t, leaf)
            refuse_derivative("a product with a Hessian", **{leaf: t})
            if t.dtype != p.dtype:
                raise TypeError(f"{leaf} must have the dtype of {own}, {p.dtype}, got {t.dtype}")
            if t.device != p.device:
                raise ValueError(f"{leaf} must be on the device of {own}, {p.device}, got {t.device}")
            if i == 0 and stacked and t.dim() == p.dim() + 1:
                count = t.shape[0]
            shape = p.shape if count is None else (count, *p.shape)
            if t.shape != shape:
                behind = "" if count is None else f", behind a first axis of {count} as in the other leaves"
                raise ValueError(f"{leaf} must have the shape of {own}, {tuple(p.shape)}{behind}, got {tuple(t.shape)}")
            vectors.append(t.detach())
        return vectors, count

    def _by_path(self, v: Any, name: str) -> list[Any]:
        pairs, _ = pytree.tree_flatten_with_path(v)
        found = {pytree.keystr(path): t for path, t in pairs}
        if set(found) != set(self.paths) or len(found) != len(pairs):
            odd = sorted(set(found) ^ set(self.paths))
            raise ValueError(f"{name} must have the structure of params; they differ in {', '.join(odd[:4])}"
                             f"{' and more' if len(odd) > 4 else ''}")
        return [found[path] for path in self.paths]


def template(matvec: Any, like: Any, function: str) -> Tree:
    """What the vectors of `matvec` look like: `like`, or the gradient that a linearized function carries."""
    if like is None:
        like = getattr(matvec, "grad", None)
        if like is None:
            raise TypeError(f"{function}: like must be given, a tensor or pytree with the shapes of a vector, unless "
                            "matvec comes from linearize_grad")
    return Tree(like, "like")
