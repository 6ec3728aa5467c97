"""The work of linear_logprob: products of a few rows with all of the weight, in torch, and the kernels around them."""
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..linalg.newton_schulz import _matmul_precision
from .selective_log_softmax import _op as _log_softmax
from .selective_log_softmax import _Softmax

_BLOCK = 8192  # rows of the weight that are widened, or whose gradient is rounded, at a time


def default_rows(hidden: Tensor) -> int:
    """Rows whose logits take no more than half the memory of the weight's gradient, where that is enough for efficient
    products; tensor cores want more."""
    return 1024 if hidden.is_cuda else min(max(256, hidden.shape[-1] // 2), 1024)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, n)) for i in range(0, max(n, 1), size))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden weight' + bias, in the dtype of out, which may be wider than that of the others."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.mT, out=out) if bias is None else torch.addmm(bias, hidden, weight.mT, out=out)
    elif out.is_cuda:
        torch.mm(hidden, weight.mT, out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias
    else:
        # torch has no such product on CPU, but one of float32 that may round to bfloat16, which loses nothing here.
        wide = hidden.to(out.dtype)
        with _matmul_precision("medium" if hidden.dtype == torch.bfloat16 else "highest"):
            for part in _chunks(len(weight), _BLOCK):
                torch.mm(wide, weight[part].to(out.dtype).mT, out=out[:, part])
        if bias is not None:
            out += bias


def _logits(hidden: Tensor, weight: Tensor, chunk_rows: int, dtype: torch.dtype) -> Tensor:
    return hidden.new_empty((min(chunk_rows, len(hidden)), len(weight)), dtype=dtype)


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float,
            entropy: bool, moments: bool, partial: bool, chunk_rows: int, fast: bool) -> tuple[Tensor, ...]:
    if hidden.is_cpu and not partial and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(f"targets must be in [0, {len(weight)}), got {low if low < 0 else high}")
    buffer = _logits(hidden, weight, chunk_rows, hidden.dtype if fast and hidden.is_cpu else _wide(hidden.dtype))
    parts = []
    for rows in _chunks(len(hidden), chunk_rows):
        logits = buffer[:rows.stop - rows.start]
        _product(hidden[rows], weight, bias, logits)
        parts.append(_log_softmax(logits, targets[rows], None, None, temperature, softcap, entropy, moments, partial))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))


def backward(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lse: Tensor, entropy: Tensor | None,
             grad_logp: Tensor, grad_lse: Tensor, grad_entropy: Tensor | None, temperature: float, softcap: float,
             need_hidden: bool, need_weight: bool, need_bias: bool, chunk_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(hidden.dtype)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape if need_weight else 0, dtype=wide)
    d_bias = weight.new_zeros(len(weight) if need_bias else 0, dtype=wide)
    # Logits may be rounded to 16 bits once they are relative to lse: what is left of the error is a part of log p.
    # CUDA has products with results in float32, and a softcap is not linear.
    relative = hidden.is_cpu and wide != hidden.dtype and not softcap
    buffer = _logits(hidden, weight, chunk_rows, hidden.dtype if relative else wide)

    def at(x: Tensor | None, rows: slice) -> Tensor | None:
        return None if x is None else x[rows].contiguous()

    for rows in _chunks(len(hidden), chunk_rows):
        h, dz, log_sum = hidden[rows], buffer[:rows.stop - rows.start], lse[rows]
        if relative:
            shift = (log_sum * temperature).to(hidden.dtype)
            torch.addmm(-shift[:, None], h, weight.mT, out=dz)
            if bias is not None:
                dz += bias
            log_sum = log_sum - shift.double() / temperature
        else:
            _product(h, weight, bias, dz)
        torch.ops.gradops.selective_log_softmax_backward_(
            dz, targets[rows], None, None, log_sum, at(entropy, rows), at(grad_logp, rows), at(grad_lse, rows),
            at(grad_entropy, rows), temperature, softcap)
        if need_bias:
            d_bias += dz.sum(0, dtype=wide)
        dz = dz.to(hidden.dtype)
        if need_hidden:
            torch.mm(dz, weight, out=d_hidden[rows])
        if need_weight:
            _accumulate(d_weight, dz, h, first=rows.start == 0)
    return d_hidden, d_weight, d_bias


def _accumulate(d_weight: Tensor, dz: Tensor, hidden: Tensor, first: bool) -> None:
    """d_weight += dz' hidden, or =, summed in the dtype of d_weight."""
    if d_weight.dtype == hidden.dtype:
        d_weight.addmm_(dz.mT, hidden, beta=0 if first else 1)
    elif d_weight.is_cuda:
        torch.addmm(d_weight, dz.mT, hidden, out_dtype=d_weight.dtype, beta=0 if first else 1, out=d_weight)
    else:
        for part in _chunks(len(d_weight), _BLOCK):
            product = dz[:, part].mT @ hidden
            d_weight[part].copy_(product) if first else d_weight[part].add_(product)


def tangents(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, directions: tuple[Any, Any, Any],
             temperature: float, softcap: float, entropy: bool, moments: bool, chunk_rows: int) -> tuple[Tensor, ...]:
    """The derivatives of all results in these directions of hidden, weight and bias, in plain torch."""
    wide = _wide(hidden.dtype)
    t_hidden, t_weight, t_bias = (None if t is None else t.to(wide) for t in directions)
    hidden, weight, bias = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    parts = []
    for rows in _chunks(len(hidden), chunk_rows):
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
