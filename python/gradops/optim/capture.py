"""Watches one forward pass, so that one backward pass gives the per-sample gradients of every parameter."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parameter import Parameter

from .rules import CHECKED, Layout, build, check_module, has_rule, layouts, leaves, rows_first, units
from .uses import Use, gram_of


@dataclass
class Call:
    """One call of a unit: a module that owns parameters, with all that is below it."""

    name: str
    module: nn.Module
    params: dict[str, Parameter]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[tuple[Tensor, int]]
    places: list[int]  # which of all outputs have a gradient
    shapes: list[torch.Size]
    outputs: list[Tensor]  # themselves, where the module has no rule
    edges: list[GradientEdge]  # of the outputs as the module returned them, whatever is done to them in place
    grads: list[Tensor] = field(default_factory=list)


# What is known of a model's calls, by (module, how often it was called before): how samples lie in its outputs.
_layouts: WeakKeyDictionary[nn.Module, dict[tuple[str, int], Layout]] = WeakKeyDictionary()
_tapes: WeakKeyDictionary[nn.Module, Tape] = WeakKeyDictionary()


class Tape:
    def __init__(self, model: nn.Module, params: Iterable[Parameter]) -> None:
        self.model, self.calls = model, list[Call]()
        self.params = {p for p in params if p.requires_grad}
        self.names = {p: name for name, p in model.named_parameters() if p in self.params}

    def watch(self) -> list[Any]:
        """Hooks on every unit; the caller removes them."""
        handles = []
        for name, module, own in units(self.model, self.params):
            if isinstance(module, CHECKED):
                handles.append(module.register_forward_pre_hook(lambda m, _, name=name: check_module(m, name)))
            if own:
                hook = self._hook(name, module, own)
                handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        return handles

    def _hook(self, name: str, module: nn.Module, params: dict[str, Parameter]) -> Any:
        keep = not has_rule(module)

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                raise RuntimeError(f"{name} was called without gradients (torch.no_grad, or reentrant checkpointing) "
                                   "inside of capture, where every call must belong to the losses")
            outs = leaves(output)
            places = [i for i, t in enumerate(outs) if isinstance(t, Tensor) and t.requires_grad]
            inputs = [t for t in leaves(*args, *kwargs.values()) if isinstance(t, Tensor)]
            self.calls.append(Call(
                name, module, params, args, kwargs, [(t, t._version) for t in inputs],
                places, [outs[i].shape for i in places], [outs[i].detach() for i in places if keep],
                [get_gradient_edge(outs[i]) for i in places],
            ))  # fmt: skip

        return record

    def uses(self, losses: Tensor, rows: Tensor, *, retain_graph: bool = False) -> list[Use]:
        """One backward pass from `rows`; then what each parameter's per-sample gradients are made of."""
        self._check(losses)
        known = self._layouts(losses)
        edges = [edge for call in self.calls for edge in call.edges]
        again = retain_graph or any(layout == "module" for layout in known)
        grads = iter(torch.autograd.grad(rows, edges, torch.ones_like(rows), retain_graph=again, allow_unused=True))
        found: dict[frozenset[Parameter], list[Use]] = {}
        for call, layout in zip(self.calls, known, strict=True):
            mine = [next(grads) for _ in call.edges]
            if all(g is None for g in mine):
                continue
            call.grads = [torch.zeros(s, device=rows.device) if g is None else g
                          for g, s in zip(mine, call.shapes, strict=True)]
            for t, version in call.versions:
                if t._version != version:
                    raise RuntimeError(f"{call.name}: its input was modified in place after its forward pass")
            use = build(call, layout, losses.shape[0], rows.shape[0])
            _join(found, use)
        return [first.merge(rest) if rest else first for first, *rest in found.values()]

    def _check(self, losses: Tensor) -> None:
        if not self.calls:
            raise RuntimeError("no module with parameters to train was called inside of capture")
        nodes = {edge.node for call in self.calls for edge in call.edges}
        stack: list[Any] = [losses.grad_fn]
        for call in self.calls:
            stack += [get_gradient_edge(t).node for t, _ in call.versions if t.requires_grad]
        seen = set(nodes)
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            follow = node.next_functions
            if not follow and getattr(node, "variable", None) in self.params:
                name = self.names.get(node.variable, "a parameter that is not of the model")
                raise ValueError(f"{name} is used outside of the forward pass of its module (in a derivative of the "
                                 "model, or by another function): its per-sample gradients are not known")
            stack.extend(next for next, _ in follow)

    def _layouts(self, losses: Tensor) -> list[Layout]:
        """How samples lie in each call. A call that is new is looked at with one more backward pass, from every second
        loss: a gradient at another sample's output tells a wrong guess, or a model that mixes samples."""
        memory = _layouts.setdefault(self.model, {})
        samples, counts = losses.shape[0], dict[str, int]()
        keys = []
        for call in self.calls:
            keys.append((call.name, counts.setdefault(call.name, 0)))
            counts[call.name] += 1
        guesses = [layouts(call, samples) for call in self.calls]
        known = [memory.get(key) for key in keys]
        if all(layout in guess for layout, guess in zip(known, guesses, strict=True)):
            return known  # type: ignore[return-value]
        edges = [call.edges[0] for call in self.calls]
        half = torch.zeros_like(losses)
        half[::2] = 1
        probes = torch.autograd.grad(losses, edges, half, retain_graph=True, allow_unused=True)
        result, mixed = [], ""
        for call, key, guess, probe in zip(self.calls, keys, guesses, probes, strict=True):
            fits = [g for g in guess if probe is None or _others_untouched(call, probe, g, samples)]
            if not fits:
                mixed = call.name  # the last one: nothing after it mixes more
            result.append(fits[0] if fits else "items")
            if fits and probe is not None and bool((probe != 0).any()):
                memory[key] = fits[0]
        if mixed:
            raise ValueError(
                f"the loss of a sample depends on the output of {mixed} for other samples: something after it mixes "
                f"samples, or its output has no dimension of {samples} samples"
            )
        return result


def _others_untouched(call: Call, probe: Tensor, layout: Layout, samples: int) -> bool:
    return not bool((rows_first(probe, layout, call, samples, samples)[1::2].abs() > 0).any())


def _join(found: dict[frozenset[Parameter], list[Use]], use: Use) -> None:
    """Uses that share a parameter come together."""
    key, members = frozenset(use.params), [use]
    for other in [k for k in found if not key.isdisjoint(k)]:
        members = found.pop(other) + members
        key |= other
    found[key] = members


@contextmanager
def watching(model: nn.Module, params: Iterable[Parameter]) -> Iterator[Tape]:
    tape = Tape(model, params)
    handles = tape.watch()
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(model: nn.Module, params: Iterable[Parameter] | None = None) -> Iterator[None]:
    """Watches the forward passes of `model` inside of the `with` block, for :func:`per_sample_gram`.

    Args:
        model: a module, for example ``nn.ModuleList`` for several.
        params: whose gradients count; all of the model's that require one, by default.

    Inputs and output gradients of every layer are kept until they are used, or until the next capture of the model.
    """
    _tapes.pop(model, None)
    with watching(model, model.parameters() if params is None else params) as tape:
        yield
    _tapes[model] = tape


@torch.no_grad()
def per_sample_gram(losses: Tensor, model: nn.Module) -> Tensor:
    r"""Inner products of the gradients of per-sample losses: the Gram matrix :math:`J J^\top`, without J.

    .. math:: G_{ab} = \Big\langle \frac{\partial \ell_a}{\partial \theta}, \frac{\partial \ell_b}{\partial \theta}
              \Big\rangle

    For outputs of a model in place of losses this is its empirical neural tangent kernel. Layers that
    :class:`Sven` has a rule for give their part from their inputs and output gradients; others by per-sample
    gradients, a bounded number at a time. The graph is kept, so that ``losses.backward(w)`` may follow.

    Args:
        losses: ``(B,)``, made by ``model`` under :func:`capture`.
        model: the module that was captured.

    Returns:
        ``(B, B)``, float64, symmetric.

    Raises:
        RuntimeError: the model was not captured, or an activation was modified in place.
        ValueError: ``losses`` has another shape, the model mixes samples, or a parameter is used outside of its
            module; the message names the module or the parameter.

    Example:
        >>> import torch
        >>> from gradops.optim import capture, per_sample_gram
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with capture(model):
        ...     outputs = model(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))[:, 0]
        >>> per_sample_gram(outputs, model)
        tensor([[25.,  3.],
                [ 3.,  1.]], dtype=torch.float64)
    """
    tape = _tapes.pop(model, None)
    if tape is None:
        raise RuntimeError("the model was not captured: make the losses under `with gradops.optim.capture(model)`")
    check_losses(losses)
    return gram_of(tape.uses(losses, losses, retain_graph=True), losses)


def check_losses(losses: Any) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a torch.Tensor, got {type(losses).__name__}")
    if losses.dim() != 1:
        raise ValueError("losses must have shape (B,), one per sample (reduction='none', averaged over a sample's "
                         f"outputs), got {tuple(losses.shape)}")
    if not losses.requires_grad:
        raise ValueError("losses must depend on the parameters, but they require no gradient")
