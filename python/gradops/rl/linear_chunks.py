"""The work of linear_logprob: products of all rows with a part of the weight, and the kernels around them."""
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..linalg.wide_matmul import wide_matmul_
from .selective_log_softmax import _op as _log_softmax
from .selective_log_softmax import _Softmax
from .vocabulary_parallel import merge_parts

_ROWS = 64  # whose logits the forward-mode derivative holds


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, n)) for i in range(0, max(n, 1), size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """A part of the vocabulary after the other: which, and all rows' logits there, in memory of the one before."""
    n, vocabulary = len(hidden), len(weight)
    memory = hidden.new_empty(n * min(chunk_size, vocabulary), dtype=_wide(hidden.dtype))
    for part in _chunks(vocabulary, chunk_size):
        width = part.stop - part.start
        logits = memory[:n * width].view(n, width)
        wide_matmul_(logits, hidden, weight[part].mT)
        if bias is not None:
            logits += bias[part]
        yield part, logits


def _local(targets: Tensor, part: slice) -> Tensor:
    """Targets counted from the start of a part; -1 for those of other parts."""
    return torch.where((targets >= part.start) & (targets < part.stop), targets - part.start, -1)


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float,
            entropy: bool, moments: bool, partial: bool, chunk_size: int) -> tuple[Tensor, ...]:
    looked_at = hidden.is_cpu and not partial
    if looked_at and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(f"targets must be in [0, {len(weight)}), got {low if low < 0 else high}")
    if looked_at and len(weight) <= chunk_size:  # nothing to merge
        (_, logits), = _logits(hidden, weight, bias, chunk_size)
        return _log_softmax(logits, targets, None, None, temperature, softcap, entropy, moments, False)
    parts, mine = [], []
    for part, logits in _logits(hidden, weight, bias, chunk_size):
        at = _local(targets, part)
        parts.append(_log_softmax(logits, at, None, None, temperature, softcap, entropy, moments, True))
        mine.append(at >= 0)
    logp, *rest = merge_parts([torch.stack(results) for results in zip(*parts, strict=True)], torch.stack(mine))
    if not partial:  # on CUDA, where nobody has looked
        logp = torch.where((targets >= 0) & (targets < len(weight)), logp, torch.nan)
    return logp, *rest


def backward(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lse: Tensor, entropy: Tensor | None,
             grad_logp: Tensor, grad_lse: Tensor, grad_entropy: Tensor | None, temperature: float, softcap: float,
             need_hidden: bool, need_weight: bool, need_bias: bool, wide_weight: bool, chunk_size: int,
             ) -> tuple[Tensor, Tensor, Tensor]:
    """wide_weight: the gradient of the weight in float32, also where that is of 16 bits."""
    wide = _wide(hidden.dtype)
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=wide)
    d_weight = weight.new_empty(weight.shape if need_weight else 0, dtype=wide if wide_weight else weight.dtype)
    d_bias = weight.new_empty(len(weight) if need_bias else 0, dtype=wide)
    grads = [None if x is None else x.contiguous() for x in (lse, entropy, grad_logp, grad_lse, grad_entropy)]
    for part, dz in _logits(hidden, weight, bias, chunk_size):
        torch.ops.gradops.selective_log_softmax_backward_(dz, _local(targets, part), None, None, *grads, temperature,
                                                          softcap)
        if need_bias:
            torch.sum(dz, 0, out=d_bias[part])
        if dz.is_cuda:
            dz = dz.to(hidden.dtype)  # once for both products
        if need_hidden:
            wide_matmul_(d_hidden, dz, weight[part], add=part.start > 0)
        if need_weight:
            wide_matmul_(d_weight[part], dz.mT, hidden)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def tangents(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, directions: tuple[Any, Any, Any],
             temperature: float, softcap: float, entropy: bool, moments: bool) -> tuple[Tensor, ...]:
    """The derivatives of all results in these directions of hidden, weight and bias, in plain torch."""
    wide = _wide(hidden.dtype)
    t_hidden, t_weight, t_bias = (None if t is None else t.to(wide) for t in directions)
    hidden, weight, bias = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    parts = []
    for rows in _chunks(len(hidden), _ROWS):
        s = _Softmax(torch.nn.functional.linear(hidden[rows], weight, bias), None, None, temperature, softcap)
        v = torch.zeros_like(s.p)
        if t_hidden is not None:
            v = v + t_hidden[rows] @ weight.mT
        if t_weight is not None:
            v = v + hidden[rows] @ t_weight.mT
        if t_bias is not None:
            v = v + t_bias
        v = (v * s.slope).masked_fill(s.masked, 0)
        mean = (s.p * v).sum(-1, keepdim=True)
        absent = v.new_zeros(len(v), 0)
        out = (v.gather(-1, targets[rows]) - mean, mean[:, 0],
               -(s.p * (s.logp + s.entropy) * v).sum(-1) if entropy else absent,
               2 * (s.p.square() * (v - mean)).sum(-1) if moments else absent,
               3 * (s.p.pow(3) * (v - mean)).sum(-1) if moments else absent)
        parts.append(tuple(t.double() for t in out))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))
