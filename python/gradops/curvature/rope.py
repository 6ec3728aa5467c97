"""Rotary position embedding."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_device, check_floating, check_matrix
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, primals, refuse_derivative, register

_op = register("rope", fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format))


@allow_in_graph
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int | None = None) -> Tensor:
    r"""Rotates pairs of features of each token by angles that depend on its position.

    .. math:: (y_i, y_k) = (x_i \cos_j - x_k \sin_j,\; x_i \sin_j + x_k \cos_j), \qquad j < r / 2

    with :math:`i = j, k = j + r/2` (GPT-NeoX, Llama), or :math:`i = 2j, k = 2j + 1` if ``interleaved`` (GPT-J);
    r is ``rotary_dim``. Features from r on are copied.

    Args:
        x: ``(..., T, d)``; float64, float32, bfloat16 or float16; any strides: heads that were moved by ``transpose``
            are read in place if their features are contiguous. Not modified.
        cos, sin: ``(..., T, r / 2)``, with leading dimensions that broadcast to those of ``x``; or ``(..., T, r)``,
            each number twice, as Hugging Face's models hand them round: of these the first half is read, or if
            ``interleaved`` every second number. Any of the dtypes, which need not be that of ``x``.
        interleaved: which features are a pair.
        rotary_dim: how many features are rotated, an even number; None for all d.

    Returns:
        A new contiguous tensor like ``x``, computed in float32 (float64 if that is the dtype) and rounded once.

    Raises:
        TypeError: an argument is no dense real floating-point tensor.
        ValueError: ``x`` has fewer than 2 dimensions, ``rotary_dim`` is odd or larger than d, or shapes or devices do
            not fit.
        RuntimeError: a derivative in ``cos`` or ``sin`` is asked for.

    Linear in ``x``: its derivative is the rotation back, and every order of derivatives is this one pass, which keeps
    nothing but the tables. In torch's operations it is about five.

    Source: J. Su et al., RoFormer, arXiv 2104.09864.

    Example:
        >>> import torch
        >>> from gradops.curvature import rope
        >>> angles = torch.tensor([[0.0], [torch.pi / 2]])
        >>> rope(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), angles.cos(), angles.sin()).round(decimals=4)
        tensor([[ 1.,  2.],
                [-2.,  1.]])
    """
    check_matrix(x, "x")
    d = x.shape[-1]
    if rotary_dim is not None:
        check_count(rotary_dim, "rotary_dim")
    r = d if rotary_dim is None else rotary_dim
    if r % 2 or r > d:
        raise ValueError(f"rotary_dim must be even and at most {d}, the last size of x, got {r}")
    for table, name in ((cos, "cos"), (sin, "sin")):
        check_floating(table, name)
        check_device(table, name, x, "x")
        if table.dim() == 0 or table.shape[-1] not in (r, r // 2):
            raise ValueError(f"{name} must have rotary_dim / 2 = {r // 2} or rotary_dim = {r} numbers in its last "
                             f"dimension, got shape {tuple(table.shape)}")
        if not _broadcasts(table.shape[:-1], x.shape[:-1]):
            raise ValueError(f"{name} must broadcast to the shape of x but for the last dimension, "
                             f"{tuple(x.shape[:-1])}, got shape {tuple(table.shape)}")
    refuse_derivative("rope", cos=cos, sin=sin)
    tables = [_table(t, x, r // 2, interleaved) for t in (cos, sin)]
    return _Rope.apply(x, *tables, interleaved, False) if needs_derivative(x) else _op(x, *tables, interleaved, False)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _table(t: Tensor, x: Tensor, pairs: int, interleaved: bool) -> Tensor:
    """One number per pair, with the leading dimensions of x, in a dtype that the kernel reads beside that of x."""
    if t.shape[-1] != pairs:
        t = t[..., ::2].contiguous() if interleaved else t[..., :pairs]
    if t.dtype != x.dtype:
        t = t.to(torch.promote_types(x.dtype, torch.float32))
    return t.expand(*x.shape[:-1], pairs)


class _Rope(Function):
    two_orders = True  # its backward pass and its jvp are itself

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
        return _op(x, cos, sin, interleaved, inverse)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        _, cos, sin, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin)
        ctx.save_for_forward(cos, sin)

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        return _Rope.apply(g, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, *_):
        return _Rope.apply(x_dot, *primals(ctx.saved_tensors), ctx.interleaved, ctx.inverse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any):
        tensors = [t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                   for t, dim in zip(args[:3], in_dims[:3], strict=True)]
        return _Rope.apply(*tensors, *args[3:]), 0
