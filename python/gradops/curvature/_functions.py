"""A loss as a function of parameters, its gradient with a graph, and products with its Hessian."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

from .._checks import check_tensor
from .._compiler import disable
from ._trees import Tree

outside_of_graphs = partial(
    disable,
    reason="products with a Hessian are made of autograd's own calls, which torch.compile cannot trace: call them "
           "outside of the compiled function, or without fullgraph=True")  # fmt: skip

_HINTS = {
    "scaled_dot_product": "fused attention has no second derivative in torch; call this under "
                          "`with gradops.curvature.second_order_kernels():`, or, with dropout, under "
                          "`with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`",
    "aot_autograd": "a compiled model has a first derivative only; pass the model as it was before torch.compile, "
                    "its `_orig_mod`",
    "CuDNN RNN": "run the model under `with torch.backends.cudnn.flags(enabled=False):`",
}


@contextmanager
def explained() -> Iterator[None]:
    """Adds the way out to torch's own message about a missing derivative."""
    try:
        yield
    except RuntimeError as error:
        for key, hint in _HINTS.items():
            if key in str(error):
                raise type(error)(f"{error}\ngradops: {hint}") from error
        raise


class _Closure(nn.Module):
    """f(module, ...) as the forward pass of a module, so that functional_call can put other parameters in."""

    def __init__(self, module: nn.Module, f: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.f = module, f

    def forward(self, *args: Any) -> Any:
        return self.f(self.module, *args)


def resolve(f: Any, params: Any, name: str = "f") -> tuple[Callable[..., Any], Tree]:
    """f as a function of a pytree, and its parameters. `f` is such a function, or (module, function of the module)."""
    if not isinstance(f, tuple):
        if not callable(f):
            raise TypeError(f"{name} must be a function of params or a tuple (module, function of the module), got "
                            f"{type(f).__name__}")
        if params is None:
            raise TypeError(f"params may be None only where {name} is a tuple (module, function of the module)")
        return f, Tree(params, "params")
    if len(f) != 2 or not isinstance(f[0], nn.Module) or not callable(f[1]):
        raise TypeError(f"{name} must be a function of params or a tuple (nn.Module, function of the module), got "
                        f"({', '.join(type(x).__name__ for x in f)})")
    module, own = f[0], dict(f[0].named_parameters(remove_duplicate=False))
    if params is None:
        params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not isinstance(params, dict):
        raise TypeError(f"params must be None or a dict from names of the module's parameters to tensors, got "
                        f"{type(params).__name__}")
    for n in params:
        if n not in own:
            raise ValueError(f"params[{n!r}] is not a parameter of {type(module).__name__}")
    closure = _Closure(*f)

    def call(tree: dict[str, Tensor], *args: Any) -> Any:
        # Copies of the buffers take what the forward pass writes (running statistics), so that the module stays as is.
        state = {f"module.{n}": t.clone() for n, t in module.named_buffers()}
        return functional_call(closure, state | {f"module.{n}": t for n, t in tree.items()}, args)

    return call, Tree(params, "params")


@contextmanager
def recording() -> Iterator[None]:
    """Graphs are recorded here, whatever mode the caller is in; torch's messages get their hints."""
    with torch.inference_mode(False), torch.enable_grad(), explained():
        yield


def leaves(params: Tree) -> list[Tensor]:
    return [p.detach().clone() if p.is_inference() else p.detach() for p in params.tensors]


def split_aux(out: Any, has_aux: bool, name: str = "f") -> tuple[Any, Any]:
    if not has_aux:
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"{name} must return (loss, aux) with has_aux=True, got {type(out).__name__}")
    return out


def check_loss(loss: Any) -> None:
    check_tensor(loss, "the result of f")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError("f must return one real number, got a tensor of shape "
                         f"{tuple(loss.shape)} and dtype {loss.dtype}")
    if not loss.requires_grad:
        raise ValueError("the loss depends on none of params: f must compute it from its argument, not from "
                         "other tensors or under no_grad")


def check_influence(grads: Sequence[Tensor | None]) -> None:
    if all(g is None for g in grads):
        raise ValueError("the loss depends on none of params: f must compute it from its argument")


def nodes(root: Any) -> Iterator[Any]:
    """Every node of the graph behind `root`."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def _guard(loss: Tensor) -> None:
    """A backward pass that autograd does not see (`once_differentiable`, a raw kernel) counts as a constant and would
    give zeros. The gradient of the loss is seeded with a number that requires grad, so that every honest result of
    such a node does too."""
    for node in nodes(loss.grad_fn):
        if isinstance(node, torch.autograd.function.BackwardCFunction) or "CppNode" in node.name():
            node.register_hook(_refuse_constants(node.name()))


def _refuse_constants(name: str) -> Callable[..., None]:
    def hook(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        if any(g is not None and g.requires_grad for g in outputs):
            for g in inputs:
                if g is None:
                    continue
                if g.grad_fn is not None and g.grad_fn.name() == "torch::autograd::Error":
                    raise RuntimeError(f"{name}: its backward pass is marked with once_differentiable, so the loss has "
                                       "no Hessian here; write the backward pass in torch operations")
                if not g.requires_grad and bool((g != 0).any()):
                    raise RuntimeError(f"{name}: its backward pass has no derivative of its own, so the Hessian would "
                                       "silently lack a part; write the backward pass in torch operations")

    return hook


class Gradient:
    """The gradient of a loss with the graph that a second backward pass needs; its values only on demand, since
    products go on from its edges."""

    def __init__(self, loss: Tensor, points: list[Tensor], *, values: bool) -> None:
        self._leaves = points
        with recording():
            _guard(loss)
            seed = torch.ones_like(loss, requires_grad=True)
            grads = torch.autograd.grad(loss, points, seed, create_graph=True, allow_unused=True)
        check_influence(grads)
        self._edges = [(i, get_gradient_edge(g)) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self.values: list[Tensor] = []
        if values:
            self.values = [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(grads, points, strict=True)]

    @classmethod
    def of(cls, f: Callable[..., Any], params: Tree, has_aux: bool, *, values: bool) -> tuple[Gradient, Tensor, Any]:
        """The gradient of f, the loss, and what else f returns."""
        with recording():
            points = [p.requires_grad_() for p in leaves(params)]
            loss, aux = split_aux(f(params.build(points)), has_aux)
            check_loss(loss)
        return cls(loss, points, values=values), loss.detach(), aux

    def product(self, v: list[Tensor], keep: bool) -> list[Tensor]:
        """H v. Without `keep` the graph is freed on the way."""
        if not self._edges:  # linear in every parameter
            return [torch.zeros_like(p) for p in self._leaves]
        with recording():
            products = torch.autograd.grad(
                [edge for _, edge in self._edges], self._leaves, [v[i] for i, _ in self._edges],
                retain_graph=keep, allow_unused=True,
            )  # fmt: skip
        return [torch.zeros_like(p) if h is None else h for h, p in zip(products, self._leaves, strict=True)]
