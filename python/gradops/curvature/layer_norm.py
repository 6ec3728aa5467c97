"""Layer norm and RMS norm whose derivatives of both orders are kernels."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_number
from .._compiler import allow_in_graph
from .._op import register
from ._second_order import Kernels, _mask, differentiable


def _like(t: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return t.new_empty(shape or t.shape, dtype=dtype)


def _with_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x, *x.shape[:-1], 2, dtype=torch.float64)


def _gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: int) -> tuple[Tensor, ...]:
    some = [t for t in (weight, bias) if t is not None]
    kind = some[0].dtype if some else torch.float32
    shapes = [x.shape, *[some[0].shape if some else x.shape] * 2]
    none = (*x.shape[:-1], 0)
    return tuple(_like(x, *(shape if wanted >> i & 1 else none), dtype=x.dtype if i == 0 else kind)
                 for i, shape in enumerate(shapes))


_forward = register("layer_norm", fake=lambda x, weight, bias, eps, center: _with_stats(x))
_jvp = register(
    "layer_norm_jvp", fake=lambda x, weight, bias, stats, x_dot, weight_dot, bias_dot, center: _with_stats(x))
_backward = register(
    "layer_norm_backward", fake=lambda x, weight, bias, stats, g, center, wanted: _gradients(x, weight, bias, wanted))
_backward_jvp = register(
    "layer_norm_backward_jvp",
    fake=lambda x, weight, bias, stats, g, x_dot, weight_dot, stats_dot, g_dot, center, wanted:
        _gradients(x, weight, bias, wanted))

# x, weight, bias; eps, center; y, and mean and rstd of every row
_norm = differentiable(
    "layer_norm",
    Kernels(
        forward=lambda x, c: _forward(*x, *c),
        backward=lambda x, c, out, g, wanted: _backward(*x, out[1], g, c[1], _mask(wanted)),
        jvp=lambda x, c, out, x_dot: _jvp(*x, out[1], *x_dot, c[1]),
        backward_jvp=lambda x, c, out, g, x_dot, out_dot, g_dot, wanted:
            _backward_jvp(*x, out[1], g, *x_dot[:2], out_dot[1], g_dot, c[1], _mask(wanted)),
    ),
    inputs=3, constants=2, outputs=2,
)  # fmt: skip


@allow_in_graph
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    r"""Layer norm over the last dimension, with fast first and second derivatives.

    .. math:: y = w \, \frac{x - \bar{x}}{\sqrt{\frac{1}{n}\sum (x - \bar{x})^2 + \epsilon}} + b

    A row's mean and variance lose no digits where the mean is much larger than the deviations. Sums over the rows, for
    the gradients of ``weight`` and ``bias``, are made in an order that does not depend on the number of threads.

    Args:
        x: ``(..., n)``; float64, float32, bfloat16 or float16. Not modified.
        weight: ``(n,)``; of the dtype of ``x``, or float32 beside bfloat16 and float16. ``None``: one.
        bias: as ``weight``, and of its dtype. ``None``: zero.
        eps: added to the variance, in squared units of ``x``.

    Returns:
        A new contiguous tensor with the shape and dtype of ``x``, rounded once.

    Raises:
        TypeError: an argument is no dense real floating-point tensor, or of a dtype that does not go with ``x``.
        ValueError: shapes or devices do not match, or ``eps`` is negative.
        RuntimeError: a derivative of the third order, or forward over forward mode, is asked for.

    Every pass reads its tensors once and writes its result once: the gradient, the change of ``y`` along a change of
    the inputs, and the change of the gradient, which serve double backward and forward over reverse alike. Ba, Kiros
    and Hinton, arXiv 1607.06450; the derivatives are in ``csrc/curvature/layer_norm.h``.

    Example:
        >>> import torch
        >>> from gradops.curvature import layer_norm
        >>> layer_norm(torch.tensor([1.0, 2.0, 3.0, 6.0]), eps=0.0)
        tensor([-1.0690, -0.5345,  0.0000,  1.6036])
    """
    _check(x, eps, weight=weight, bias=bias)
    return _norm(x, weight, bias, eps, True)


@allow_in_graph
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    r"""RMS norm over the last dimension, with fast first and second derivatives.

    .. math:: y = w \, \frac{x}{\sqrt{\frac{1}{n}\sum x^2 + \epsilon}}

    Squares whose sum leaves the range of float32 are summed in float64. Sums over the rows, for the gradient of
    ``weight``, are made in an order that does not depend on the number of threads.

    Args:
        x: ``(..., n)``; float64, float32, bfloat16 or float16. Not modified.
        weight: ``(n,)``; of the dtype of ``x``, or float32 beside bfloat16 and float16. ``None``: one.
        eps: added to the mean square, in squared units of ``x``. (That of `torch.nn.functional.rms_norm`, if not given,
            is the distance from 1 to the next number of the dtype of ``x``.)

    Returns:
        A new contiguous tensor with the shape and dtype of ``x``, rounded once, after the product with ``weight``.

    Raises:
        TypeError: an argument is no dense real floating-point tensor, or of a dtype that does not go with ``x``.
        ValueError: shapes or devices do not match, or ``eps`` is negative.
        RuntimeError: a derivative of the third order, or forward over forward mode, is asked for.

    Every pass reads its tensors once and writes its result once, as in :func:`layer_norm`. Zhang and Sennrich,
    arXiv 1910.07467.

    Example:
        >>> import torch
        >>> from gradops.curvature import rms_norm
        >>> rms_norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), eps=0.0)
        tensor([1.2000, 1.6000, 0.0000, 0.0000])
    """
    _check(x, eps, weight=weight)
    return _norm(x, weight, None, eps, False)


def _check(x: Any, eps: Any, **parameters: Any) -> None:
    check_floating(x, "x")
    if x.dim() < 1:
        raise ValueError("x must have at least 1 dimension (..., n), got shape ()")
    check_number(eps, "eps")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    kind = None
    for name, t in parameters.items():
        if t is None:
            continue
        check_floating(t, name)
        if t.dtype != x.dtype and not (t.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, or be float32 beside bfloat16 and float16, "
                            f"got {t.dtype}")
        if kind not in (None, t.dtype):
            raise TypeError(f"{name} must have the dtype of weight, {kind}, got {t.dtype}")
        kind = t.dtype
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have the shape of a row of x, {tuple(x.shape[-1:])}, got {tuple(t.shape)}")
        check_device(t, name, x, "x")
