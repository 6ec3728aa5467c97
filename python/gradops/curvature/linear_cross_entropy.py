"""Cross-entropy of an output layer, without all the logits at once, with derivatives of two orders."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_integers, check_like, check_one_of, may_look
from .._op import _library, refuse_derivative, register
from ._linear_ce_chunks import ggn, ggn_outputs, outputs, sweep
from ._second_order import Kernels, Maybe, Values, differentiable

_library.define("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? lse, Tensor? g, "
                "Tensor? hidden_dot, Tensor? weight_dot, Tensor? bias_dot, Tensor? g_dot, int ignore_index, "
                "float label_smoothing, int wanted, int wanted_dot) -> (Tensor loss, Tensor lse, Tensor d_hidden, "
                "Tensor d_weight, Tensor d_bias, Tensor loss_dot, Tensor lse_dot, Tensor d_hidden_dot, "
                "Tensor d_weight_dot, Tensor d_bias_dot)")
_library.define("linear_ce_ggnvp(Tensor hidden, Tensor weight, Tensor? hidden_dot, Tensor? weight_dot, Tensor scale) "
                "-> (Tensor, Tensor)")
torch.library.impl(_library, "linear_cross_entropy", "CompositeExplicitAutograd")(sweep)
torch.library.impl(_library, "linear_ce_ggnvp", "CompositeExplicitAutograd")(ggn)
_op = register("linear_cross_entropy", fake=outputs)
_ggnvp = register("linear_ce_ggnvp", fake=ggn_outputs)

# The last constant, `now`, says what y is. -1: the losses of the rows, which may have any gradient g; so the backward
# pass makes the logits again. Otherwise their sum, of whose gradients (a mask) those that are to be expected are made in
# the forward pass, beside the logits, kept, and later multiplied by g; their changes come with the change of the sum.
_ROWS = -1


def _known(now: int, wanted: Sequence[bool]) -> bool:
    return now != _ROWS and not sum(1 << i for i, w in enumerate(wanted) if w) & ~now


def _bits(wanted: Sequence[bool]) -> int:
    return sum(1 << i for i, w in enumerate(wanted) if w)


def _of_rows(g: Tensor, rows: Tensor, now: int) -> Tensor:
    return g if now == _ROWS else g[..., None].expand_as(rows)


def _times(g: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return (t * g.to(t.dtype).reshape(*g.shape, *[1] * (t.dim() - g.dim()))).to(like.dtype)


def _value(numbers: Values, now: int) -> list[Tensor]:
    loss, *others = numbers
    return [loss if now == _ROWS else loss.sum(-1), *others]


def _mask(now: int) -> int:
    return max(now, 0)


def _ones(target: Tensor, now: int) -> Maybe:
    return torch.ones_like(target, dtype=torch.float64) if now > 0 else None


def _forward(x: Values, c: Values) -> list[Tensor]:
    target, ignore_index, label_smoothing, now = c
    out = _op(*x, target, None, _ones(target, now), *[None] * 4, ignore_index, label_smoothing, _mask(now), 0)
    return _value(out[:5], now)


def _backward(x: Values, c: Values, out: Values, g: Tensor, wanted: Sequence[bool]) -> Values:
    target, ignore_index, label_smoothing, now = c
    if _known(now, wanted):
        return [_times(g, t, like) if w else None for w, t, like in zip(wanted, out[2:], x, strict=True)]
    grads = _op(*x, target, out[1], _of_rows(g, target, now), *[None] * 4, ignore_index, label_smoothing, _bits(wanted),
                0)[2:5]
    return [t.to(like.dtype) if w else None for w, t, like in zip(wanted, grads, x, strict=True)]


def _jvp(x: Values, c: Values, out: Values, x_dot: Values) -> list[Tensor]:
    target, ignore_index, label_smoothing, now = c
    changes = _op(*x, target, out[1], _ones(target, now), *x_dot, None, ignore_index, label_smoothing, 0, _mask(now))[5:]
    return _value(changes, now)


def _backward_jvp(x: Values, c: Values, out: Values, g: Tensor, x_dot: Values, out_dot: Values, g_dot: Maybe,
                  wanted: Sequence[bool]) -> Values:
    target, ignore_index, label_smoothing, now = c
    if _known(now, wanted):
        grads = [_times(g, t, like) if w else None for w, t, like in zip(wanted, out_dot[2:], x, strict=True)]
        if g_dot is not None:
            grads = [t if t is None else t + _times(g_dot, s, like)
                     for t, s, like in zip(grads, out[2:], x, strict=True)]
        return grads
    changes = _op(*x, target, out[1], _of_rows(g, target, now), *x_dot,
                  None if g_dot is None else _of_rows(g_dot, target, now), ignore_index, label_smoothing, 0,
                  _bits(wanted))[7:]
    return [t.to(like.dtype) if w else None for w, t, like in zip(wanted, changes, x, strict=True)]


_call = differentiable("linear_cross_entropy", Kernels(_forward, _backward, _jvp, _backward_jvp), inputs=3, constants=4,
                       outputs=5)


@torch.compiler.allow_in_graph
def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
                         ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    r"""doc"""
    rows = hidden.shape[:-1]
    at = target.reshape(-1).long()
    x = hidden.reshape(-1, hidden.shape[-1]), weight, bias
    now = _ROWS if reduction == "none" else _bits([t is not None and t.requires_grad for t in x])
    if not torch.is_grad_enabled():
        now = min(now, 0)
    loss = _call(*x, at, ignore_index, float(label_smoothing), now)
    if reduction == "mean":
        loss = loss / (at != ignore_index).sum()
    return (loss.reshape(rows) if reduction == "none" else loss).to(hidden.dtype)
