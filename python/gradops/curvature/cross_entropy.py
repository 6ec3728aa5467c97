"""The cross entropy of logits with class indices, with derivatives of two orders."""
from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_integers, check_number, check_one_of
from .._compiler import allow_in_graph
from .._op import register
from ._second_order import Kernels, Maybe, Values, differentiable


def _rows(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(z.new_empty(z.shape[:-1], dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def _like(z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


_forward = register("cross_entropy", fake=_rows)
_jvp = register("cross_entropy_jvp", fake=_rows)
_backward = register("cross_entropy_backward", fake=_like)
_backward_jvp = register("cross_entropy_backward_jvp", fake=_like)
# for those who own the logits, or their changes, as linear_cross_entropy does: they write over them
register("cross_entropy_backward_", fake=lambda *_: None, vmap=False)
register("cross_entropy_backward_jvp_", fake=lambda *_: None, vmap=False)


def _change_of_gradient(x: Values, c: Values, out: Values, g: Tensor, x_dot: Values, out_dot: Values, g_dot: Maybe,
                        wanted: Any) -> list[Tensor]:
    target, *rest = c
    return [_backward_jvp(x[0], target, x_dot[0], out[1], out_dot[1], g, g_dot, *rest)]


# The loss of every row, in float64, of logits (..., V)
_losses = differentiable("cross_entropy", Kernels(
    forward=lambda x, c: _forward(*x, *c),
    backward=lambda x, c, out, g, wanted: [_backward(x[0], c[0], out[1], g, *c[1:])],
    jvp=lambda x, c, out, x_dot: _jvp(x[0], c[0], x_dot[0], out[1], *c[1:]),
    backward_jvp=_change_of_gradient,
), inputs=1, constants=3, outputs=2)  # fmt: skip


@allow_in_graph
def cross_entropy(input: Tensor, target: Tensor, weight: None = None, *, ignore_index: int = -100,
                  reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    r"""The cross entropy of logits with class indices; :func:`torch.nn.functional.cross_entropy` with a second order.

    .. math::
        \ell = \log \sum_j e^{z_j} - \sum_j t_j z_j, \qquad t = (1 - s)\, e_{target} + \frac{s}{C}, \qquad
        \nabla \ell = p - t, \qquad \nabla^2 \ell\, u = p \circ (u - p^\top u), \quad p = \mathrm{softmax}(z)

    with :math:`s` the ``label_smoothing``. Reverse and forward mode, both orders, vmap and torch.compile are exact;
    derivatives of the third order raise.

    Args:
        input: the logits, ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``; float64, float32, bfloat16 or float16.
        target: class indices in [0, C), of the shape of ``input`` without C; int64 or int32.
        weight: must be None: class weights are not taken.
        ignore_index: rows with this target have loss and gradient 0, whatever their logits, and do not count in a mean.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A mean of no rows is NaN.
        label_smoothing: in [0, 1].

    Returns:
        The loss, in the dtype of ``input``; with "none", of the shape of ``target``.

    Raises:
        TypeError: an argument is no tensor of its kind; ``weight`` is given; ``target`` holds probabilities.
        ValueError: shapes, devices or numbers do not fit; on the CPU, a target outside [0, C). On CUDA that is not
            checked, since it would stop the stream: the loss of such a row, and its gradient, is NaN.

    A logit of -inf has p = 0 and gradient 0 (less t); a row of nothing else, or with a NaN, is NaN. Arithmetic is in
    float32 (float64 for float64 logits) with sums carried on in float64; a loss is within 1e-6 max(1, loss) of the
    exact one, and the mean or sum is made in float64 before it is rounded. The loss reads the logits once and allocates
    nothing of their size; the gradient, and its change, is one read and one write. ``(N, C, d1, ...)`` is copied once,
    to have C last.

    Example:
        >>> import torch
        >>> from gradops.curvature import cross_entropy
        >>> z, v = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> loss = lambda z: cross_entropy(z, torch.tensor([0, 1]))
        >>> torch.func.jvp(torch.func.grad(loss), (z,), (v,))[1]
        tensor([[ 0.1250, -0.1250],
                [ 0.0000,  0.0000]])
    """
    _check(input, target, weight, ignore_index, reduction, label_smoothing)
    z = input if input.dim() <= 2 else input.movedim(1, -1)
    losses = _losses(z, target.long(), int(ignore_index), float(label_smoothing))
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / (target != ignore_index).sum()
    return losses.to(input.dtype)


def check_rule(ignore_index: Any, reduction: Any, reductions: tuple[str, ...], label_smoothing: Any) -> None:
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    check_one_of(reduction, "reduction", reductions)
    check_number(label_smoothing, "label_smoothing")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def check_target(target: Any, shape: torch.Size, logits: Tensor, name: str) -> None:
    """Class indices for every row of the logits, the argument `name`."""
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(f"target must hold class indices, int64 or int32, got {target.dtype}; for probabilities use "
                        "torch.nn.functional.cross_entropy")
    check_integers(target, "target")
    if target.shape != shape:
        raise ValueError(f"target must have shape {tuple(shape)} for {name} of shape {tuple(logits.shape)}, got "
                         f"{tuple(target.shape)}")
    check_device(target, "target", logits, name)


def _check(input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any) -> None:
    check_floating(input, "input")
    if weight is not None:
        raise TypeError("weight must be None: class weights are not taken; use torch.nn.functional.cross_entropy")
    classes = min(input.dim() - 1, 1)
    if classes < 0 or input.shape[classes] == 0:
        raise ValueError(f"input must have at least 1 class, (C), (N, C) or (N, C, d1, ...), got {tuple(input.shape)}")
    shape = input.shape[:classes] + input.shape[classes + 1:]
    check_target(target, shape, input, "input")
    check_rule(ignore_index, reduction, ("mean", "sum", "none"), label_smoothing)
