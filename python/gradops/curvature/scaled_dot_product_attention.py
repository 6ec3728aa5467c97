"""Scaled dot-product attention with two orders of derivatives, of which nothing of queries x keys is stored."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_number, check_tensor
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register
from ._second_order import Kernels, Maybe, Values, differentiable


def _rows(q: Tensor) -> Tensor:
    """As many numbers as q has rows: what is kept of each."""
    return q.new_empty(q.shape[:-1], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _rows(q)


def _fake_gradients(*args: Any) -> tuple[Tensor, ...]:
    wanted = args[-1]
    return tuple(t.new_empty((*t.shape[:-1], t.shape[-1] if wanted >> i & 1 else 0)) for i, t in enumerate(args[:3]))


_forward = register("scaled_dot_product_attention", fake=_fake_forward)
_dual = register("scaled_dot_product_attention_dual", fake=lambda *args: _fake_forward(*args) + _fake_forward(*args))
_jvp = register("scaled_dot_product_attention_jvp", fake=_fake_forward)
_backward = register("scaled_dot_product_attention_backward", fake=_fake_gradients)
_backward_jvp = register("scaled_dot_product_attention_backward_jvp", fake=_fake_gradients)
_backward_dual = register("scaled_dot_product_attention_backward_dual",
                          fake=lambda *args: _fake_gradients(*args) + _fake_gradients(*args))


def _bits(wanted: Values) -> int:
    return sum(1 << i for i, flag in enumerate(wanted) if flag)


def _two(values: Values) -> tuple[Values, Values]:
    half = len(values) // 2
    return values[:half], values[half:]


_attention = differentiable("scaled_dot_product_attention", Kernels(
    forward=lambda x, c: _forward(*x, *c),
    backward=lambda x, c, out, g, wanted: _backward(*x, *c, *out, g, _bits(wanted)),
    jvp=lambda x, c, out, x_dot: _jvp(*x, *c, *out, *x_dot),
    backward_jvp=lambda x, c, out, g, x_dot, out_dot, g_dot, wanted: _backward_jvp(
        *x, *c, *out, g, *x_dot, *out_dot, g_dot, _bits(wanted)),
    dual=lambda x, c, x_dot: _two(_dual(*x, *c, *x_dot)),
    backward_dual=lambda x, c, out, g, x_dot, out_dot, g_dot, wanted: _two(_backward_dual(
        *x, *c, *out, g, *x_dot, *out_dot, g_dot, _bits(wanted))),
), inputs=3, constants=3, outputs=2)  # fmt: skip


@allow_in_graph
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Maybe = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    r"""Scaled dot-product attention that can be differentiated twice at the memory of the flash kernels.

    .. math:: O = \operatorname{softmax}(s\, Q K^\top + M)\, V

    The arguments are those of :func:`torch.nn.functional.scaled_dot_product_attention`, whose fused kernels have no
    second derivative, so that a Hessian-vector product falls back on one that stores every score. Here the gradient,
    the change of the output along a direction (forward mode) and that of the gradient are kernels too, tile by tile.

    Args:
        query: :math:`Q`, ``(..., Hq, L, E)``; float64, float32, bfloat16 or float16. Products and sums are made in
            float64 for float64 and in float32 elsewhere; those of bfloat16, without changes, in products of bfloat16
            with float32 sums where the processor has them.
        key: :math:`K`, ``(..., H, S, E)``.
        value: :math:`V`, ``(..., H, S, Ev)``.
        attn_mask: :math:`M`, broadcast to ``(..., Hq, L, S)``: boolean, True where a key is seen; or numbers that are
            added, of the dtype of query or float32, which is rounded to it. It has no derivative. A query that sees no
            key gives zeros, and has zero gradients.
            Numbers hide by -inf: where finite ones of 1e6 and beyond hide every key of a query, float32 has no digits
            left to tell its keys apart, and that query's output and gradients mean nothing (in torch's kernels too).
        dropout_p: must be 0: there is no dropout here.
        is_causal: query i sees keys 0 to i. Not together with attn_mask.
        scale: :math:`s`; None takes :math:`1/\sqrt{E}`.
        enable_gqa: Hq may be a multiple of H, query head i reads key head ``i // (Hq // H)``.

    Returns:
        ``(..., Hq, L, Ev)``, contiguous. Dimensions in front broadcast.

    Raises:
        TypeError: an argument is no dense tensor of one of these dtypes, or dtypes differ.
        ValueError: shapes or devices do not fit, dropout_p is not 0, or both attn_mask and is_causal are given.
        RuntimeError: a derivative with respect to attn_mask, or of the third order, is asked for.

    A gradient costs 7 products of tiles, one with its change along a direction 21 (forward mode over reverse mode) or
    24 (``jvp(grad(f))``, double backward); each is half of that with is_causal. Kept for the backward pass are the
    inputs, the output and one number a row. Results have the same bits for any number of threads and batch.

    Source: T. Dao, FlashAttention-2, arXiv 2307.08691, for the tiles; the derivatives follow from the formula.

    Example:
        >>> import torch
        >>> from torch.func import grad, jvp
        >>> from gradops.curvature import scaled_dot_product_attention
        >>> q, k, v = torch.eye(2), torch.eye(2), torch.tensor([[1.0], [2.0]])
        >>> scaled_dot_product_attention(q, k, v, is_causal=True)
        tensor([[1.0000],
                [1.6698]])
        >>> f = lambda q: scaled_dot_product_attention(q, k, v).sum()
        >>> jvp(grad(f), (q,), (torch.eye(2),))[1]
        tensor([[ 0.0375, -0.0375],
                [ 0.0375, -0.0375]])
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_floating(t, name)
        if t.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions (..., heads, rows, columns), got shape "
                             f"{tuple(t.shape)}")
        if t.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {t.dtype}")
        check_device(t, name, query, "query")
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0, there is no dropout here; got {dropout_p}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the {query.shape[-1]} columns of query, got shape {tuple(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have the {key.shape[-2]} rows of key, got shape {tuple(value.shape)}")
    if scale is not None:
        check_number(scale, "scale")
    flat = max(query.dim(), key.dim(), value.dim()) == 2
    q, k, v = _broadcast(query, key, value, enable_gqa)
    mask = None if attn_mask is None else _mask(attn_mask, q, k, is_causal)
    factor = (1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0) if scale is None else float(scale)
    o = _attention(q, k, v, mask, factor, bool(is_causal))
    return o[0] if flat else o


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> list[Tensor]:
    """All three with one shape in front of heads, rows and columns; keys and values with as many heads as queries, or,
    in groups, a divisor of that."""
    tensors = [t if t.dim() > 2 else t[None] for t in (query, key, value)]
    q, k, v = (tuple(t.shape[:-3]) for t in tensors)
    heads, key_heads, value_heads = (t.shape[-3] for t in tensors)
    if q == k == v and heads == key_heads == value_heads:
        return tensors
    try:
        front = torch.broadcast_shapes(q, k, v)
        if enable_gqa:
            if key_heads != value_heads or (heads % key_heads if key_heads else heads):
                raise ValueError(f"query must have a multiple of the heads of key and value, got {heads}, {key_heads} "
                                 f"and {value_heads}")
        else:
            heads = key_heads = torch.broadcast_shapes((heads,), (key_heads,), (value_heads,))[0]
    except RuntimeError:
        raise ValueError("query, key and value must have dimensions in front of rows and columns that broadcast, or "
                         f"enable_gqa=True; got shapes {tuple(query.shape)}, {tuple(key.shape)} and "
                         f"{tuple(value.shape)}") from None
    return [t.expand(*front, h, -1, -1) for t, h in zip(tensors, (heads, key_heads, key_heads), strict=True)]


def _mask(mask: Tensor, q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    check_tensor(mask, "attn_mask")
    refuse_derivative("scaled_dot_product_attention", attn_mask=mask)
    if is_causal:
        raise ValueError("attn_mask must be None with is_causal=True, got both")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(f"attn_mask must be bool, float32 or of query's dtype, {q.dtype}, got {mask.dtype}")
    check_device(mask, "attn_mask", q, "query")
    full = (*q.shape[:-1], k.shape[-2])
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    try:
        return mask.expand(full)
    except RuntimeError:
        raise ValueError(f"attn_mask must broadcast to {full}, got shape {tuple(mask.shape)}") from None
