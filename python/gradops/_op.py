"""How an op of this library is called from Python; every op goes through `register`.

A C++ op that only has a kernel per device is a trap: torch.func.grad and jvp take it for a constant and
return zeros. So a raw `torch.ops.gradops.*` call raises when an input needs a derivative. Derivatives
live in `Function`s outside the op; those, and calls that need none, use the callable that `register` returns, which
skips the autograd layer of the dispatcher.
"""
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from ._precision import without_autocast

_library = torch.library.Library("gradops", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd


def needs_derivative(*tensors: Tensor) -> bool:
    """Whether autograd, forward mode or torch.func could ask for a derivative of what is computed from these."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        # In a compiled graph torch.func.jvp enters its level without forward_ad's knowledge.
        levels = torch._C._functorch.get_interpreter_stack() or []
        forward = sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)
        if forward > 1:
            # torch does not differentiate the jvp of an autograd.Function in forward mode: it would be 0
            raise RuntimeError("forward-mode derivatives of forward-mode derivatives (torch.func.jvp or jacfwd inside "
                               "another) are not supported; take one of the two in reverse mode, as "
                               "torch.func.hessian does")
        if forward or forward_ad._current_level >= 0:  # type: ignore[attr-defined]
            return True
    if torch.is_grad_enabled():
        for t in tensors:  # a loop, since `any` of a generator costs four times as much
            if t.requires_grad:
                return True
    return False


def primals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Saved tensors as a jvp needs them: under forward_ad they still carry their tangents, which would
    make the tangent ask for its own derivative."""
    return [primal(t) for t in tensors]


def primal(t: Tensor) -> Tensor:
    return forward_ad.unpack_dual(t).primal


class Function(torch.autograd.Function):
    """An autograd.Function with `setup_context`, whose `forward` has no default arguments.

    Torch looks for those at each call, by `inspect.signature`, which takes longer than a small op. Derivatives are as
    precise as their dtypes also where they are asked for under autocast.
    """

    def __init_subclass__(cls) -> None:
        for name in {"backward", "jvp"} & set(vars(cls)):
            setattr(cls, name, staticmethod(without_autocast(getattr(cls, name))))

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        bare = [unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # type: ignore[attr-defined]
            return cls.forward(*bare)  # there is nothing to record
        return super(torch.autograd.Function, cls).apply(*bare)  # type: ignore[misc]  # as torch's own does


class KeepsInputs(Function):
    """A function of tensors whose derivatives, in both modes, start from its inputs."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


def refuse_derivative(function: str, **tensors: Tensor | None) -> None:
    """For functions whose results are constants of the training loss: raises where a derivative is asked for."""
    for name, t in tensors.items():
        if t is None:
            continue
        tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None  # type: ignore[attr-defined]
        if tangent or (torch.is_grad_enabled() and t.requires_grad):
            raise RuntimeError(f"{function}: {name} asks for a derivative, which {function} does not have; "
                               f"pass {name}.detach()")


def register(name: str, *, fake: Callable[..., Any], vmap: bool = True) -> Callable[..., Any]:
    """Completes `torch.ops.gradops.<name>` and returns the callable for use inside this package.

    fake: the outputs' shapes, dtypes and devices, as `torch.library.register_fake` takes them.
    vmap: every tensor of the op has its batch dimensions in front, so a new one may be put there.
    """
    op = getattr(torch.ops.gradops, name).default
    inner = op._op  # what is behind the method __call__
    torch.library.register_fake(f"gradops::{name}", fake)
    if vmap:
        torch.library.register_vmap(f"gradops::{name}", _in_front(op))
    _library.impl(name, _refuse_derivatives(op), "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        with _below_autograd():
            return inner(*args)

    return call


def _refuse_derivatives(op: Any) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(f"{op}: an input requires grad, but this op has no derivative of its own; "
                               "call the function of the same name in gradops, or detach the input")
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):  # type: ignore[attr-defined]
            raise RuntimeError(f"{op}: an input carries a forward-mode tangent, but this op has no derivative of its "
                               "own; call the function of the same name in gradops, or detach the input")
        with _below_autograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def _in_front(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def put(a: Any, dim: Any) -> Any:
            if isinstance(a, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [put(t, d) for t, d in zip(a, dim, strict=True)]
            if not isinstance(a, Tensor):
                return a
            return a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)

        out = op(*(put(a, d) for a, d in zip(args, in_dims, strict=True)))
        return out, 0 if isinstance(out, Tensor) else (0,) * len(out)

    return rule
