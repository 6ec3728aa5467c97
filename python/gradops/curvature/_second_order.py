"""Operations with derivatives of two orders, from four functions that autograd does not see into.

For y = f(x) those are f itself; backward, the gradient along g; jvp, the change of y along a change of x; and
backward_jvp, the change of the gradient. Each is an `autograd.Function` whose derivatives are others of the four:

    forward         x        -> y             backward: backward                  jvp: jvp
    backward        x, y, g  -> dx            backward: jvp and backward_jvp      jvp: backward_jvp
    jvp             x, y, x. -> y.            backward: backward and backward_jvp jvp: raises
    backward_jvp    ...      -> dx.           a third order: raises

So reverse over reverse, forward over reverse, reverse over forward and vmap are exact or raise, whatever composition
asks for them. Passes may keep numbers of the forward one beside y (a logsumexp); these are outputs too, in reverse mode
without a derivative of their own, since the whole one is attributed to x, and in forward mode with their changes.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._op import Function, needs_derivative, primal

Maybe = Tensor | None
Values = Sequence[Any]


@dataclass(frozen=True)
class Kernels:
    """x: the inputs that have derivatives, some None; c: the other arguments; out: y and what is kept beside it.
    Changes (`*_dot`) that are None are zero. Results are lists like the inputs; of those that `wanted` does not ask
    for, anything. With `dual`, changes that come with the input are computed in the same pass."""

    forward: Callable[[Values, Values], Sequence[Tensor]]  # x, c -> out
    backward: Callable[[Values, Values, Values, Tensor, Sequence[bool]], Values]  # x, c, out, g, wanted -> dx
    jvp: Callable[[Values, Values, Values, Values], Sequence[Tensor]]  # x, c, out, x_dot -> out_dot
    # x, c, out, g, x_dot, out_dot, g_dot, wanted -> dx_dot
    backward_jvp: Callable[[Values, Values, Values, Tensor, Values, Values, Maybe, Sequence[bool]], Values]
    dual: Callable[[Values, Values, Values], tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None  # out, out_dot
    # the arguments of backward_jvp -> dx, dx_dot
    backward_dual: Callable[..., tuple[Values, Values]] | None = None


def differentiable(
    name: str, kernels: Kernels, *, inputs: int, constants: int, outputs: int = 1
) -> Callable[..., Tensor]:  # fmt: skip
    """y as a function of `inputs` tensors and `constants` other arguments, in this order."""
    n, c, m = inputs, constants, outputs
    head = (n, c, m)

    class Forward(_Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return tuple(kernels.forward(args[:n], args[n:]))

        @staticmethod
        def setup_context(ctx: Any, inputs, output) -> None:
            _keep(ctx, (*inputs, *output))

        @staticmethod
        def backward(ctx: Any, g: Maybe, *others: Maybe):
            _no_gradient(name, others)
            return *_gradient(ctx, _kept(ctx), g), *[None] * c

        @staticmethod
        def jvp(ctx: Any, *tangents: Maybe):
            return Jvp.apply(*_kept(ctx, primal), *tangents[:n])

    class Backward(_Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            x, const, out, (g, wanted) = _cut(args, *head, 2)
            return _pick(kernels.backward(x, const, out, g, _flags(wanted, n)), wanted)

        @staticmethod
        def setup_context(ctx: Any, inputs, output) -> None:
            _keep(ctx, inputs)

        @staticmethod
        def backward(ctx: Any, *picked: Maybe):
            *base, g, wanted = _kept(ctx)
            u = _spread(picked, wanted, n)
            grads: Values = [None] * n
            if all(t is None for t in u):
                return *grads, *[None] * (c + m + 2)
            # <u, dx> = <g, the change of y along u>: its gradient in g is that change, in x the product along u.
            out_dot = Jvp.apply(*base, *u)
            wants = _mask(ctx.needs_input_grad[:n])
            if wants:
                grads = _spread(BackwardJvp.apply(*base, g, *u, *out_dot, None, wants), wants, n)
            return *grads, *[None] * (c + m), out_dot[0], None

        @staticmethod
        def jvp(ctx: Any, *tangents: Maybe):
            *base, g, wanted = _kept(ctx, primal)
            x_dot, _, out_dot, (g_dot, _) = _cut(tangents, *head, 2)
            if all(t is None for t in x_dot):  # linear in g
                return Backward.apply(*base, torch.zeros_like(g) if g_dot is None else g_dot, wanted)
            if any(t is None for t in out_dot):
                out_dot = Jvp.apply(*base, *x_dot)
            return BackwardJvp.apply(*base, g, *x_dot, *out_dot, g_dot, wanted)

    class Jvp(_Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return tuple(kernels.jvp(*_cut(args, *head, n)))

        @staticmethod
        def setup_context(ctx: Any, inputs, output) -> None:
            _keep(ctx, (*inputs, *output))

        @staticmethod
        def backward(ctx: Any, w: Maybe, *others: Maybe):
            _no_gradient(name, others)
            base, x_dot, out_dot = _cut(_kept(ctx), n + c + m, n, m)
            grads: Values = [None] * n
            dot_grads: Values = [None] * n
            if w is not None:  # <w, y.> = <dx along w, x.>
                wants = _mask(ctx.needs_input_grad[:n])
                if wants:
                    grads = _spread(BackwardJvp.apply(*base, w, *x_dot, *out_dot, None, wants), wants, n)
                wants = _mask(ctx.needs_input_grad[n + c + m:])
                if wants:
                    dot_grads = _spread(Backward.apply(*base, w, wants), wants, n)
            return *grads, *[None] * (c + m), *dot_grads

        @staticmethod
        def jvp(ctx: Any, *tangents: Maybe):
            raise RuntimeError(f"{name}: forward mode over forward mode is not supported; take one of the two in "
                               "reverse mode, as torch.func.hessian does")

    class BackwardJvp(_Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            x, const, out, (g,), x_dot, out_dot, (g_dot, wanted) = _cut(args, *head, 1, n, m, 2)
            flags = _flags(wanted, n)
            return _pick(kernels.backward_jvp(x, const, out, g, x_dot, out_dot, g_dot, flags), wanted)

        @staticmethod
        def setup_context(ctx: Any, inputs, output) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Maybe):
            raise RuntimeError(f"{name}: derivatives of the third order are not supported")

        jvp = backward

    class Dual(torch.autograd.Function):
        """Forward and jvp in one pass, where the input comes with its change; then also backward and backward_jvp."""

        two_orders = True

        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            assert kernels.dual is not None
            out, out_dot = kernels.dual(*_cut(args, n, c, n))
            ctx.mark_non_differentiable(*out_dot)
            _keep(ctx, (*args[:n + c], *out, *args[n + c:], *out_dot))
            return *out, *out_dot

        @staticmethod
        def backward(ctx: Any, g: Maybe, *others: Maybe):
            _no_gradient(name, others[:m - 1])
            base, x_dot, out_dot = _cut(_kept(ctx), n + c + m, n, m)
            if forward_ad._current_level < 0:  # type: ignore[attr-defined]  # the changes are out of date
                grads = _gradient(ctx, base, g)
            elif torch.is_grad_enabled():  # a graph of this pass is wanted: only the four can give one
                x, const, out = _cut(base, *head)
                grads = _gradient(ctx, [*map(_with, x, x_dot), *const, *map(_with, out, out_dot)], g)
            else:
                grads = _dual_gradient(ctx, base, x_dot, out_dot, g)
            return *grads, *[None] * (c + n)

    for function in (Forward, Backward, Jvp, BackwardJvp, Dual):  # node names are what torch's messages show
        function.__name__ = function.__qualname__ = name.title().replace("_", "") + function.__name__
        function._backward_cls.__name__ = function.__name__ + "Backward"  # type: ignore[attr-defined]

    def _gradient(ctx: Any, base: Values, g: Maybe) -> Values:
        wanted = ctx.needs_input_grad[:n]
        if g is None or not any(wanted):
            return [None] * n
        graph = torch.is_grad_enabled() or forward_ad._current_level >= 0  # type: ignore[attr-defined]
        if not graph and torch._C._functorch.peek_interpreter_stack() is None:
            # No derivative of this pass will be asked for, and a Function costs more than a small pass does.
            x, const, out = _cut(base, *head)
            grads = kernels.backward(x, const, out, g, wanted)
            return [t if flag else None for t, flag in zip(grads, wanted, strict=True)]
        wants = _mask(wanted)
        return _spread(Backward.apply(*base, g, wants), wants, n)

    def _dual_gradient(ctx: Any, base: Values, x_dot: Values, out_dot: Values, g: Maybe) -> Values:
        wants = ctx.needs_input_grad[:n]
        if g is None or not any(wants):
            return [None] * n
        g, g_dot = forward_ad.unpack_dual(g)
        assert kernels.backward_dual is not None
        grads, grads_dot = kernels.backward_dual(*_cut(base, *head), g, x_dot, out_dot, g_dot, wants)
        return [_with(*pair) if w else None for w, *pair in zip(wants, grads, grads_dot, strict=True)]

    def call(*args: Any) -> Tensor:
        x = args[:n]
        if not needs_derivative(*[t for t in x if t is not None]):
            return kernels.forward(x, args[n:])[0]
        if (kernels.dual is not None and forward_ad._current_level >= 0  # type: ignore[attr-defined]
                and torch._C._functorch.peek_interpreter_stack() is None):
            pairs = [(None, None) if t is None else forward_ad.unpack_dual(t) for t in x]
            if any(dot is not None for _, dot in pairs):
                out = Dual.apply(*[t for t, _ in pairs], *args[n:], *[dot for _, dot in pairs])
                return forward_ad.make_dual(out[0], out[m])
        return Forward.apply(*args)[0]

    return call


class _Function(Function):
    """Kernels take any batch dimensions in front, the same for every tensor; so a new one may be put there."""

    two_orders = True

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def put(a: Any, dim: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            return a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)

        outputs = cls.apply(*(put(a, d) for a, d in zip(args, in_dims, strict=True)))
        return outputs, (0,) * len(outputs)


def has_two_orders(node: Any) -> bool:
    """Whether a node of a graph is of a function made here."""
    return getattr(getattr(type(node), "_forward_cls", None), "two_orders", False)


def _keep(ctx: Any, values: Values) -> None:
    tensors = [v if isinstance(v, Tensor) else None for v in values]
    ctx.values = [v if t is None else None for t, v in zip(tensors, values, strict=True)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def _kept(ctx: Any, bare: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    saved = ctx.saved_tensors  # once: a checkpoint recomputes them at the first look, and refuses a second one
    if bare is not None:
        saved = [t if t is None else bare(t) for t in saved]
    return [v if t is None else t for t, v in zip(saved, ctx.values, strict=True)]


def _with(t: Maybe, dot: Maybe) -> Maybe:
    return t if t is None or dot is None else forward_ad.make_dual(t, dot)


def _no_gradient(name: str, others: Sequence[Maybe]) -> None:
    for t in others:
        if t is not None:
            raise RuntimeError(f"{name}: what is kept for the backward pass has no gradient of its own")


def _cut(values: Values, *counts: int) -> list[Values]:
    parts, end = [], 0
    for count in counts:
        parts.append(values[end:end + count])
        end += count
    return parts


# Which of the inputs' gradients a function returns is a number: tuples among the arguments confuse torch.func.
def _mask(flags: Sequence[bool]) -> int:
    mask = 0
    for i, flag in enumerate(flags):
        if flag:
            mask |= 1 << i
    return mask


def _flags(mask: int, n: int) -> list[bool]:
    return [bool(mask >> i & 1) for i in range(n)]


def _pick(values: Values, mask: int) -> tuple[Tensor, ...]:
    return tuple(v for i, v in enumerate(values) if mask >> i & 1)


def _spread(picked: Values, mask: int, n: int) -> list[Any]:
    rest = iter(picked)
    return [next(rest) if flag else None for flag in _flags(mask, n)]
