"""What discounted_returns, lambda_returns, gae and vtrace share: checks, and one linear map with its adjoint.

All of them are linear in rewards and values. The transpose of a recurrence from the end of a row is one from its start,
so the derivative of `_Map` is `_Adjoint`, made of `carry_scan`s, and the derivative of that is `_Map`: exact, to any
order.
"""
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_integers, check_like, check_tensor
from .._op import Function, needs_derivative, register


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _per_token(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=_wide(x.dtype), memory_format=torch.contiguous_format)


def _fake_carry(x, a, cu_seqlens):
    rows = x.shape[:-1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    return _per_token(x), x.new_empty(rows, dtype=_wide(x.dtype))


_advantage_scan = register("advantage_scan", fake=lambda rewards, *_: (_per_token(rewards), _per_token(rewards)))
_return_scan = register("return_scan", fake=lambda rewards, *_: _per_token(rewards))
_carry_scan = register("carry_scan", fake=_fake_carry)


class Steps(NamedTuple):
    """Everything that is constant in the map."""

    terminated: Tensor | None
    truncated: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    ratios: Tensor | None
    gamma: float
    lam: float
    rho_clip: float
    c_clip: float


class Inputs(NamedTuple):
    """What the map is linear in; all of one dtype."""

    rewards: Tensor
    values: Tensor | None
    next_values: Tensor | None
    last_values: Tensor | None


def check(rewards: Any, values: Any, next_values: Any, last_values: Any, terminated: Any, truncated: Any, mask: Any,
          cu_seqlens: Any, gamma: float, lam: float, ratios: Any = None, clips: tuple[float, float] = (1.0, 1.0),
          ) -> tuple[Inputs, Steps]:
    """The checked arguments, numbers brought to one dtype."""
    check_floating(rewards, "rewards")
    if rewards.dim() < 1:
        raise ValueError("rewards must have at least 1 dimension (..., T), got a scalar")
    rows = rewards.shape[:-1]
    if cu_seqlens is not None:
        check_integers(cu_seqlens, "cu_seqlens")
        check_device(cu_seqlens, "cu_seqlens", rewards, "rewards")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
        if rewards.dim() != 1:
            raise ValueError(f"rewards must have shape (N,) with cu_seqlens, got {tuple(rewards.shape)}")
        rows = torch.Size((cu_seqlens.shape[0] - 1,))
        cu_seqlens = cu_seqlens.long()
    for name, x in (("values", values), ("next_values", next_values), ("log_ratios", ratios)):
        if x is not None:
            check_floating(x, name)
            check_like(x, name, rewards, "rewards")
    for name, x in (("terminated", terminated), ("truncated", truncated), ("mask", mask)):
        if x is not None:
            check_tensor(x, name)
            if x.dtype != torch.bool:
                raise TypeError(f"{name} must be bool, got {x.dtype}")
            check_like(x, name, rewards, "rewards")
    if truncated is not None and next_values is None:
        raise ValueError("truncated needs next_values, the values of the states in which the rows were cut")
    if last_values is not None:
        check_floating(last_values, "last_values")
        check_device(last_values, "last_values", rewards, "rewards")
        if last_values.shape != rows:
            raise ValueError(f"last_values must have shape {tuple(rows)}, one number per row, "
                             f"got {tuple(last_values.shape)}")
        if next_values is not None:
            raise ValueError("give last_values or next_values, not both: next_values holds the last ones")
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {factor}")
    numbers = [x for x in (rewards, values, next_values, last_values) if x is not None]
    dtype = rewards.dtype
    for x in numbers[1:]:
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    rewards, values, next_values, last_values = (
        x if x is None or x.dtype == dtype else x.to(dtype) for x in (rewards, values, next_values, last_values))
    if ratios is not None:
        ratios = ratios.to(_wide(ratios.dtype)).exp().to(dtype if dtype == torch.float64 else torch.float32)
    return (Inputs(rewards, values, next_values, last_values),
            Steps(terminated, truncated, mask, cu_seqlens, ratios, float(gamma), float(lam), *clips))


def advantages(inputs: Inputs, steps: Steps) -> tuple[Tensor, Tensor]:
    if _any_derivative(inputs):
        return _Map.apply("advantages", *inputs, *steps)
    return _run_advantages(inputs, steps)


def returns(inputs: Inputs, steps: Steps) -> Tensor:
    if _any_derivative(inputs):
        return _Map.apply("returns", *inputs, *steps)[0]
    return _run_returns(inputs, steps)


def _any_derivative(inputs: Inputs) -> bool:
    return needs_derivative(*(x for x in inputs if x is not None))


def _run_advantages(inputs: Inputs, s: Steps) -> tuple[Tensor, Tensor]:
    numbers: list[Tensor | None] = list(inputs)
    if s.ratios is not None:  # float32 or float64, as then all numbers of the op
        numbers = [None if x is None else x.to(s.ratios.dtype) for x in inputs]
    return _advantage_scan(*numbers, s.ratios, s.terminated, s.truncated, s.mask, s.cu_seqlens, s.gamma, s.lam,
                           s.rho_clip, s.c_clip)


def _run_returns(inputs: Inputs, s: Steps) -> Tensor:
    return _return_scan(*inputs, s.terminated, s.truncated, s.mask, s.cu_seqlens, s.gamma, s.lam)


def _hide(x: Tensor, where: Tensor | None) -> Tensor:
    """Zero where `where` holds."""
    return x if where is None else torch.where(where, 0, x)


def _weights(like: Tensor, s: Steps) -> tuple[Tensor | None, Tensor, Tensor]:
    """(tokens that do not count, gamma or 0 at a cut, factor from the carry of the next token to this one's)."""
    skipped = None if s.mask is None else ~s.mask
    cuts = [flag for flag in (s.terminated, s.truncated) if flag is not None]
    g = torch.full_like(like, s.gamma)
    for cut in cuts:
        g = torch.where(cut, 0, g)
    a = g * s.lam
    if s.ratios is not None:
        a = torch.where(a == 0, 0, a * s.ratios.to(a.dtype).clamp(max=s.c_clip))
    return skipped, g, a if skipped is None else torch.where(skipped, 1, a)


def _to_following(grad: Tensor, skipped: Tensor | None, s: Steps) -> tuple[Tensor, Tensor]:
    """From the cotangents of the values that follow each token to those of values and of last_values."""
    stay = torch.zeros_like(grad) if skipped is None else skipped.to(grad.dtype)
    to_values, to_last = _carry_scan(grad, stay, s.cu_seqlens)
    return _hide(to_values, skipped), to_last


def _adjoint_of_advantages(grads: tuple[Tensor, ...], present: list[bool], s: Steps) -> list[Tensor]:
    skipped, g, a = _weights(grads[0], s)
    grad_a, grad_r = (_hide(x, skipped) for x in grads)
    if s.ratios is None:
        grad = grad_a + grad_r
        carried, _ = _carry_scan(_hide(a * grad, skipped), a, s.cu_seqlens)
        delta = _hide(grad + carried, skipped)
    else:
        rho = s.ratios.to(a.dtype).clamp(max=s.rho_clip)
        into = _hide(a * grad_r + torch.where(g == 0, 0, g * rho) * grad_a, skipped)
        carried, _ = _carry_scan(into, a, s.cu_seqlens)
        delta = _hide(rho * (grad_a + grad_r + carried), skipped)
    following = _hide(s.gamma * delta, s.terminated)
    if present[2]:
        return [delta, grad_r - delta, following]
    to_values, to_last = _to_following(following, skipped, s)
    return [delta, grad_r - delta + to_values, to_last]


def _adjoint_of_returns(grads: tuple[Tensor, ...], present: list[bool], s: Steps) -> list[Tensor]:
    skipped, _, a = _weights(grads[0], s)
    grad = _hide(grads[0], skipped)
    carried, to_start = _carry_scan(_hide(a * grad, skipped), a, s.cu_seqlens)
    total = _hide(grad + carried, skipped)
    following = _hide((s.gamma - a) * total, s.terminated)
    if present[2]:  # the walk started with next_values of the last token that counts: the one that lam = 0 shows
        zero = torch.zeros_like(grad)
        return [total, following + _return_scan(zero, zero, None, to_start, None, None, s.mask, s.cu_seqlens, 1.0, 0.0)]
    if present[1]:
        to_values, to_last = _to_following(following, skipped, s)
        return [total, to_values, to_start + to_last]
    return [total, to_start]


class _Map(Function):
    """Advantages and returns from (kind, *Inputs, *Steps)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind: str, *args: Any) -> tuple[Tensor, ...]:
        inputs, steps = Inputs(*args[:4]), Steps(*args[4:])
        return _run_advantages(inputs, steps) if kind == "advantages" else (_run_returns(inputs, steps),)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.kind, ctx.numbers, ctx.dtype = inputs[0], inputs[10:], inputs[1].dtype
        ctx.shapes = [None if x is None else x.shape for x in inputs[1:5]]
        ctx.save_for_backward(*inputs[5:10])
        ctx.save_for_forward(*inputs[5:10])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        present = [shape is not None for shape in ctx.shapes]
        results = iter(_Adjoint.apply(ctx.kind, present, ctx.dtype, *_two(grads), *ctx.saved_tensors, *ctx.numbers))
        return None, *(next(results) if here else None for here in present), *(None,) * 9

    @staticmethod
    def jvp(ctx: Any, _, *tangents: Any):
        some = next(t for t in tangents[:4] if t is not None)
        full = [t if t is not None or shape is None else some.new_zeros(shape)
                for t, shape in zip(tangents[:4], ctx.shapes, strict=True)]
        return _Map.apply(ctx.kind, *full, *ctx.saved_tensors, *ctx.numbers)


class _Adjoint(Function):
    """The transpose of _Map: cotangents of those inputs that are present."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind: str, present: list[bool], dtype: torch.dtype, grad: Tensor, other: Tensor | None, *steps: Any):
        adjoint = _adjoint_of_advantages if kind == "advantages" else _adjoint_of_returns
        grads = (grad,) if other is None else (grad, other)
        results = adjoint(grads, present, Steps(*steps))
        # an adjoint gives last_values a cotangent wherever next_values has none
        return tuple(x.to(dtype) for x in results[: sum(present)])

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.constants, ctx.numbers = inputs[:3], inputs[10:]
        ctx.save_for_backward(*inputs[5:10])
        ctx.save_for_forward(*inputs[5:10])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        kind, present, _ = ctx.constants
        given = iter(grads)
        inputs = [next(given) if here else None for here in present]
        outputs = _Map.apply(kind, *inputs, *ctx.saved_tensors, *ctx.numbers)
        return None, None, None, *_two(outputs), *(None,) * 9

    @staticmethod
    def jvp(ctx: Any, _kind, _present, _dtype, grad: Any, other: Any, *_):
        if ctx.constants[0] == "advantages":
            grad = torch.zeros_like(other) if grad is None else grad
            other = torch.zeros_like(grad) if other is None else other
        return _Adjoint.apply(*ctx.constants, grad, other, *ctx.saved_tensors, *ctx.numbers)


def _two(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    return tensors[0], tensors[1] if len(tensors) > 1 else None
