"""The product with a GPTQ checkpoint's weight, read as it is packed."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_one_of, check_tensor
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, refuse_derivative, register
from .gptq_pack import BITS, FORMATS

_MOST_ROWS = 32  # on CUDA, for the kernel that unpacks as it goes
_CHUNK = 1024  # inputs whose weights are dense at a time in a backward pass; a whole number of words for all bits

_op = register("dequant_linear", vmap=False, fake=lambda x, qweight, scales, *_: x.new_empty(
    (*x.shape[:-1], scales.shape[1])))
_weight = register("dequant_weight", vmap=False, fake=lambda like, qweight, scales, qzeros, g_idx, inputs, *_:
                   like.new_empty((inputs, scales.shape[1])))


def _vmap_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    op = torch.ops.gradops.dequant_linear
    if all(d is None for d in in_dims[1:]):
        return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    return torch.stack([op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
                        for i in range(info.batch_size)]), 0


torch.library.register_vmap("gradops::dequant_linear", _vmap_rule)


@allow_in_graph
def dequant_linear(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None = None,
                   bias: Tensor | None = None, *, bits: int, group_size: int = -1,
                   checkpoint_format: str = "gptq") -> Tensor:
    r"""A linear layer whose weight is in the packed form of GPTQ checkpoints.

    .. math::
        y_j = b_j + \sum_i x_i \, s_{g_i j} \, (q_{ij} - z_{g_i j})

    The weight is unpacked in registers: what is read is the packed words.

    Args:
        x: ``(..., in)``; float32, bfloat16, float16 or float64. Not modified.
        qweight: int32 ``(ceil(in bits / 32), out)``, as :func:`pack_gptq` makes it.
        scales: ``(groups, out)``, any floating dtype.
        qzeros: int32 ``(groups, ceil(out bits / 32))``.
        g_idx: int32 ``(in,)``, the group of each input, in any order. None: ``group_size`` inputs after each other.
        bias: ``(out,)``, any floating dtype.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group where ``g_idx`` is None; -1: all are one group.
        checkpoint_format: ``"gptq"``, where zero points are stored less one, or ``"gptq_v2"``.

    Returns:
        ``(..., out)``, in the dtype of ``x``.

    Raises:
        TypeError: an argument is no dense tensor of its kind.
        ValueError: shapes, devices or names do not fit; on CPU, a group that is not there.
        RuntimeError: a derivative in anything but ``x`` is asked for.

    Codes less zero points are exact, their products with ``x`` are summed in float32, and only ``y`` is rounded to the
    dtype of ``x``. On CPU a row of ``y`` has the same bits whatever the other rows. There the time of a few rows is
    that of reading the words; inputs whose groups follow each other, ``group_size`` at least 32, are the fast case.
    Two paths make the weight dense first: float64, and on CUDA more than 32 rows, where it is rounded to the dtype of
    ``x``. So do derivatives, some inputs at a time, on CPU in float32. Differentiable in ``x`` to any order.

    Example:
        >>> import torch
        >>> from gradops.quant import dequant_linear, pack_gptq, rtn_quantize
        >>> q = rtn_quantize(torch.randn(16, 64), group_size=32, scale_dtype=torch.float16)
        >>> x = torch.randn(3, 64)
        >>> y = dequant_linear(x, **pack_gptq(q, bits=4), bits=4)
        >>> torch.allclose(y, x @ q.weight.T, atol=1e-5)
        True
    """
    check_floating(x, "x")
    if x.dim() < 1:
        raise ValueError("x must have at least 1 dimension (..., in), got a number")
    check_one_of(bits, "bits", BITS)
    check_one_of(checkpoint_format, "checkpoint_format", FORMATS)
    _check_packed(x, qweight, scales, qzeros, g_idx, bias, bits, group_size)
    refuse_derivative("dequant_linear", scales=scales, bias=bias)
    n = x.shape[-1]
    packed = (qweight, scales, qzeros, g_idx)
    numbers = (n, bits, group_size if group_size > 0 else max(n, 1), checkpoint_format == "gptq")
    if needs_derivative(x):
        return _Product.apply(x, bias, False, *packed, *numbers)
    return _product(x, bias, *packed, *numbers)


def dense_weight(dtype: torch.dtype, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, n: int,
                 bits: int, group_size: int, less_one: bool) -> Tensor:
    """The weight, transposed: (in, out)."""
    return _weight(torch.empty(0, dtype=dtype, device=qweight.device), qweight, scales, qzeros, g_idx, n, bits,
                   group_size, less_one)


def _product(x: Tensor, bias: Tensor | None, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None,
             n: int, bits: int, group_size: int, less_one: bool) -> Tensor:
    """x W' + bias"""
    if x.dtype == torch.float64 or (x.is_cuda and x.numel() > _MOST_ROWS * n):
        y = x @ dense_weight(x.dtype, qweight, scales, qzeros, g_idx, n, bits, group_size, less_one)
        return y if bias is None else (y + bias).to(x.dtype)
    return _op(x, qweight, scales, qzeros, g_idx, bias, bits, group_size, less_one)


def _transposed(g: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, n: int, bits: int,
                group_size: int, less_one: bool) -> Tensor:
    """g W"""
    wide = g.dtype if g.is_cuda else torch.promote_types(g.dtype, torch.float32)
    if g_idx is None:
        g_idx = torch.arange(n, dtype=torch.int32, device=qweight.device) // group_size
    parts = []
    for begin in range(0, n, _CHUNK):
        size, words = min(_CHUNK, n - begin), qweight[begin * bits // 32 : (begin + _CHUNK) * bits // 32]
        weight = dense_weight(wide, words, scales, qzeros, g_idx[begin : begin + size], size, bits, 1, less_one)
        parts.append((g.to(wide) @ weight.mT).to(g.dtype))
    return torch.cat(parts, -1) if parts else g.new_empty((*g.shape[:-1], 0))


class _Product(Function):
    """_product, or _transposed: each is the derivative of the other, and linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, transposed: bool, *weight: Any) -> Tensor:
        return _transposed(x, *weight) if transposed else _product(x, bias, *weight)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        _, _, ctx.transposed, *packed, ctx.n, ctx.bits, ctx.group_size, ctx.less_one = inputs
        ctx.save_for_backward(*packed)
        ctx.save_for_forward(*packed)

    @staticmethod
    def _apply(ctx: Any, x: Tensor, transposed: bool) -> Tensor:
        return _Product.apply(x, None, transposed, *ctx.saved_tensors, ctx.n, ctx.bits, ctx.group_size, ctx.less_one)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return (_Product._apply(ctx, grad, not ctx.transposed), *[None] * 10)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_):
        return _Product._apply(ctx, tangent, ctx.transposed)


def _check_packed(x: Tensor, qweight: Any, scales: Any, qzeros: Any, g_idx: Any, bias: Any, bits: int,
                  group_size: int) -> None:
    for t, name in ((qweight, "qweight"), (qzeros, "qzeros"), (g_idx, "g_idx")):
        if t is None and name == "g_idx":
            continue
        check_tensor(t, name)
        if t.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {t.dtype}")
        check_device(t, name, x, "x")
    for t, name in ((scales, "scales"), (bias, "bias")):
        if t is None and name == "bias":
            continue
        check_floating(t, name)
        check_device(t, name, x, "x")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size must be positive, or -1 for all inputs, got {group_size}")
    if scales.dim() != 2:
        raise ValueError(f"scales must have shape (groups, out), got {tuple(scales.shape)}")
    n, (groups, out) = x.shape[-1], scales.shape
    if g_idx is None and groups != -(-n // (group_size if group_size > 0 else max(n, 1))):
        raise ValueError(f"scales must have a row for each group of {group_size} of {n} inputs, got {groups} rows")
    for t, name, want in ((qweight, "qweight", ((n * bits + 31) // 32, out)),
                          (qzeros, "qzeros", (groups, (out * bits + 31) // 32)),
                          (g_idx, "g_idx", (n,)), (bias, "bias", (out,))):
        if t is not None and tuple(t.shape) != want:
            raise ValueError(f"{name} must have shape {want} for x of {n} inputs, scales of {tuple(scales.shape)} and "
                             f"bits={bits}, got {tuple(t.shape)}")
