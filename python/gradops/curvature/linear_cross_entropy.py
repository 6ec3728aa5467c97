"""Cross-entropy of an output layer, without all the logits at once, with derivatives of two orders."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_linear
from .._compiler import allow_in_graph
from .._op import _library, register
from ._linear_ce_chunks import outputs, sweep
from ._second_order import Kernels, Maybe, Values, _mask, differentiable
from .cross_entropy import check_rule, check_target

_library.define("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? lse, "
                "Tensor? g, Tensor? hidden_dot, Tensor? weight_dot, Tensor? bias_dot, Tensor? g_dot, "
                "int ignore_index, float label_smoothing, int wanted, int wanted_dot) "
                "-> (Tensor loss, Tensor lse, Tensor d_hidden, Tensor d_weight, Tensor d_bias, "
                "Tensor loss_dot, Tensor lse_dot, Tensor d_hidden_dot, Tensor d_weight_dot, Tensor d_bias_dot)")
torch.library.impl(_library, "linear_cross_entropy", "CompositeExplicitAutograd")(sweep)
_op = register("linear_cross_entropy", fake=outputs)

# What y is. _ROWS: the loss of every row, which may get any gradient g, so that the backward pass makes the logits
# again. Otherwise their sum, and this number a mask of the gradients to be expected: those are made beside the logits
# in the forward pass, kept as further outputs, and multiplied by g in the backward pass; and so are their changes.
_ROWS = -1


def _run(x: Values, c: Values, lse: Maybe, g: Maybe, x_dot: Values, g_dot: Maybe, wanted: int, wanted_dot: int,
         ) -> tuple[list[Tensor], list[Tensor]]:
    """What comes out, as y, lse and gradients; and the changes of these."""
    target, ignore_index, label_smoothing, expected = c
    rows = [t if t is None or expected == _ROWS else t[..., None].expand_as(target) for t in (g, g_dot)]
    out = _op(*x, target, lse, rows[0], *x_dot, rows[1], ignore_index, label_smoothing, wanted, wanted_dot)
    values = list(out[:5]), list(out[5:])
    if expected != _ROWS:
        for results in values:
            results[0] = results[0].sum(-1)
    return values


def _expected(x: Values, c: Values) -> tuple[Maybe, int]:
    """g and the mask with which gradients are made ahead."""
    target, *_, expected = c
    return (x[0].new_ones(target.shape[:-1], dtype=torch.float64), expected) if expected > 0 else (None, 0)


def _there(wanted: Sequence[bool], c: Values) -> bool:
    return c[3] != _ROWS and not _mask(wanted) & ~c[3]


def _rounded(grads: Values, x: Values, wanted: Sequence[bool]) -> list[Maybe]:
    return [None if not w else t if t.dtype == like.dtype else t.to(like.dtype)
            for t, like, w in zip(grads, x, wanted, strict=True)]


def _times(g: Tensor, grads: Values, wanted: Sequence[bool]) -> list[Any]:
    g = g.to(grads[0].dtype)
    return [None if not w else t * (g.reshape(*g.shape, *[1] * (t.dim() - g.dim())) if g.dim() else g)
            for t, w in zip(grads, wanted, strict=True)]


def _forward(x: Values, c: Values) -> list[Tensor]:
    g, mask = _expected(x, c)
    return _run(x, c, None, g, [None] * 3, None, mask, 0)[0]


def _backward(x: Values, c: Values, out: Values, g: Tensor, wanted: Sequence[bool]) -> Values:
    if _there(wanted, c):
        return _rounded(_times(g, out[2:], wanted), x, wanted)
    return _rounded(_run(x, c, out[1], g, [None] * 3, None, _mask(wanted), 0)[0][2:], x, wanted)


def _jvp(x: Values, c: Values, out: Values, x_dot: Values) -> list[Tensor]:
    g, mask = _expected(x, c)
    return _run(x, c, out[1], g, x_dot, None, 0, mask)[1]


def _backward_jvp(x: Values, c: Values, out: Values, g: Tensor, x_dot: Values, out_dot: Values, g_dot: Maybe,
                  wanted: Sequence[bool]) -> Values:
    if not _there(wanted, c):
        return _rounded(_run(x, c, out[1], g, x_dot, g_dot, 0, _mask(wanted))[1][2:], x, wanted)
    changes = _times(g, out_dot[2:], wanted)
    if g_dot is not None:
        changes = [t if t is None else t.add_(s)
                   for t, s in zip(changes, _times(g_dot, out[2:], wanted), strict=True)]
    return _rounded(changes, x, wanted)


def _dual(x: Values, c: Values, x_dot: Values) -> tuple[list[Tensor], list[Tensor]]:
    g, mask = _expected(x, c)
    return _run(x, c, None, g, x_dot, None, mask, mask)


def _backward_dual(x: Values, c: Values, out: Values, g: Tensor, x_dot: Values, out_dot: Values, g_dot: Maybe,
                   wanted: Sequence[bool]) -> tuple[Values, Values]:
    if _there(wanted, c):
        return _backward(x, c, out, g, wanted), _backward_jvp(x, c, out, g, x_dot, out_dot, g_dot, wanted)
    both = _run(x, c, out[1], g, x_dot, g_dot, _mask(wanted), _mask(wanted))
    return _rounded(both[0][2:], x, wanted), _rounded(both[1][2:], x, wanted)


_losses = differentiable("linear_cross_entropy", Kernels(_forward, _backward, _jvp, _backward_jvp, _dual,
                                                         _backward_dual), inputs=3, constants=4, outputs=5)


@allow_in_graph
def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
                         ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy of logits that a linear layer makes, without ever holding all of them; with a second order.

    .. math::
        z = h W^\top + b, \qquad \ell = \log \sum_j e^{z_j} - \sum_j t_j z_j, \qquad
        t = (1 - s)\, e_{target} + \frac{s}{V}

    with :math:`s` the ``label_smoothing``: :func:`cross_entropy` of :func:`torch.nn.functional.linear`. Reverse and
    forward mode, both orders, vmap and torch.compile are exact; derivatives of the third order raise.

    With a change (a dot) of the three inputs, p = softmax(z) and :math:`g_i` the gradient of the loss of a row:

    .. math::
        \dot z = \dot h W^\top + h \dot W^\top + \dot b, \quad D = \mathrm{diag}(g)(p - t), \quad
        \dot D = \mathrm{diag}(\dot g)(p - t) + \mathrm{diag}(g)\, p \circ (\dot z - p^\top \dot z) \\
        dh = D W, \quad dW = D^\top h, \quad \dot{dh} = \dot D W + D \dot W, \quad
        \dot{dW} = \dot D^\top h + D^\top \dot h

    Args:
        hidden: ``(..., H)``; float64, float32, bfloat16 or float16. Not modified.
        weight: ``(V, H)``, of the dtype of ``hidden``.
        target: ``(...)``; int64 or int32, in [0, V).
        bias: ``(V,)``, of the dtype of ``hidden``; -inf leaves a class out.
        ignore_index: rows with this target have loss and gradient 0; they do not count in a mean.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A mean of no rows is NaN, with gradient 0.
        label_smoothing: in [0, 1].

    Returns:
        The loss, in the dtype of ``hidden``; with "none", of the shape of ``target``.

    Raises:
        TypeError: an argument is no dense tensor of its kind, or dtypes differ.
        ValueError: shapes, devices or numbers do not fit; on the CPU, a target outside [0, V). On CUDA that is not
            checked: the loss of such a row, and the gradients, are NaN.

    Rows are taken in chunks of at most 256 (1024 on CUDA), and no more than a quarter of all (but 64): one matrix of a
    chunk's logits is in memory, and for a change another one. A reduced loss makes the gradients in the same visit of
    the chunk, if its inputs require any, and keeps them until the backward pass, which multiplies them by a number:
    6 N H V operations, as with the logits kept, and H (N + V) numbers in float32 (float64 for float64). In evaluation
    use ``torch.no_grad()``, without which it makes gradients for nobody. With "none" the backward pass makes the logits
    again: 8 N H V. The change of the gradient, in either mode, costs 14 N H V more of a reduced loss; with "none" 14,
    and 6 for the change of the loss.

    Products of float32 input are in float32 (as torch's settings say), those of 16-bit input are exact with sums in
    float32, and so are the logits, of which only their gradient is rounded to 16 bits, for the products with it.
    Gradients are sums in float32, rounded once. The bits of a row are those of torch's products.

    Example:
        >>> import torch
        >>> from gradops.curvature import linear_cross_entropy
        >>> hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
        >>> target = torch.tensor([2, 1])
        >>> linear_cross_entropy(hidden, weight, target)
        tensor(0.3236)
        >>> gradient = torch.func.grad(lambda w: linear_cross_entropy(hidden, w, target))
        >>> torch.func.jvp(gradient, (weight,), (torch.eye(3, 2),))[1]
        tensor([[ 0.0410, -0.1676],
                [-0.0110,  0.3353],
                [-0.0299, -0.1676]])
    """
    check_linear(hidden, weight, bias)
    rows = hidden.shape[:-1]
    check_target(target, rows, hidden, "hidden")
    check_rule(ignore_index, reduction, ("mean", "sum", "none"), label_smoothing)
    at = target.reshape(-1).long()
    x = hidden.reshape(-1, hidden.shape[-1]), weight, bias
    expected = _ROWS if reduction == "none" else 0
    if expected == 0 and torch.is_grad_enabled():
        expected = _mask([t is not None and t.requires_grad for t in x])
    loss = _losses(*x, at, int(ignore_index), float(label_smoothing), expected)
    if reduction == "none":
        loss = loss.reshape(rows)
    if reduction == "mean":
        count = (at != ignore_index).sum()
        loss = loss / count.clamp(min=1) + torch.where(count > 0, 0.0, torch.nan)
    return loss.to(hidden.dtype)
