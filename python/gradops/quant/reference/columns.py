"""The column loop as one writes it in plain torch: a matrix at a time, a column at a time, in the dtype of H."""
import torch
from torch import Tensor

from .._columns import QuantizedWeight, blocks, column_order

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def gptq_quantize(
    W: Tensor, H: Tensor, *, bits: int = 4, group_size: int = 128, sym: bool = True, desc_act: bool = False,
    static_groups: bool = False, act_group_aware: bool = False, scales: Tensor | None = None,
    zeros: Tensor | None = None, mse: float = 0.0, block_size: int = 128, method: str = "gptq", alpha: float = 0.25,
    beta: float = 0.2, D: Tensor | None = None, grid: str = "int", group_params: str = "fresh",
    pull_across_blocks: bool = False, compat: str | None = None, damp_percent: float = 0.01,
    damp_auto_increment: float = 0.0, factor_dtype: torch.dtype | None = None, factor: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:  # fmt: skip
    lead, (rows, n) = W.shape[:-2], W.shape[-2:]
    g = max(1, n if group_size == -1 else min(group_size, n))
    foem, gptaq, authors = method.startswith("foem"), method.endswith("gptaq"), compat == "authors"

    def items(x: Tensor | None) -> list:
        x = None if x is None else x.expand(*lead, *x.shape[-2:]).reshape(lead.numel(), *x.shape[-2:])
        return [None] * lead.numel() if x is None else list(x)

    results = []
    for w, h, d, given, given_zero, u in zip(*map(items, (W, H, D, scales, zeros, factor)), strict=True):
        w, h = w.to(h.dtype, copy=True), h.clone()
        dead = h.diagonal() == 0
        info = 2 if not h.isfinite().all() else 3 if dead.all() else -int(dead.sum())
        if info > 0:
            h = torch.eye(n, dtype=h.dtype, device=h.device)
        else:
            h += torch.diag(dead.to(h.dtype))
            w[:, dead] = 0
        order = column_order(h.diagonal(), g, desc_act, act_group_aware)
        order = torch.arange(n, device=w.device) if order is None else order
        damp = damp_percent
        while u is None and info <= 0:
            u, failed = _factor(h[order][:, order], damp, factor_dtype)
            if failed and damp_auto_increment > 0 and damp + damp_auto_increment <= 1:
                damp, u = damp + damp_auto_increment, None
            elif failed:
                info = 1
        u = torch.eye(n, dtype=h.dtype, device=h.device) if info > 0 else u.to(h.dtype)
        p = torch.zeros_like(u)
        if gptaq and info <= 0:
            p = alpha * (d.to(u.dtype)[order][:, order] @ u.mT).triu(1) @ u
        unit = _unit(w)

        def choose(x: Tensor, unit: Tensor = unit) -> tuple[Tensor, Tensor]:
            return _find_scale(x, bits, sym, authors, mse, grid, scale_dtype, unit)

        fixed = None
        if given is not None:
            zero = torch.full_like(given, 2.0 ** (bits - 1)) if given_zero is None else given_zero
            fixed = list(zip(given.to(w.dtype).unbind(-1), zero.to(w.dtype).unbind(-1), strict=True))
        elif static_groups:
            fixed = [choose(w[:, i : i + g]) for i in range(0, n, g)]
        w = w[:, order].contiguous()
        original, chosen = w.clone(), {}
        codes, q, loss = torch.zeros_like(w), torch.zeros_like(w), w.new_zeros(rows)
        for begin, end in blocks(n, g, block_size, fixed is None and group_params == "fresh"):
            stale, e, latent = w.clone(), torch.zeros_like(w[:, begin:end]), torch.zeros_like(w[:, begin:end])
            for i in range(begin, end):
                if fixed is None and i % g == 0:
                    chosen[i // g] = choose((w if group_params == "fresh" else stale)[:, i : i + g])
                scale, zero = fixed[int(order[i]) // g] if fixed is not None else chosen[i // g]
                if foem and (i > begin or pull_across_blocks):
                    w[:, i] -= beta * (w[:, i] - original[:, i])
                now = w[:, i].clone()
                codes[:, i], q[:, i] = _round(now, scale, zero, bits, grid)
                moved = now - q[:, i] - (beta * (now - original[:, i]) if foem else 0)
                e[:, i - begin] = moved / u[i, i]
                latent[:, i - begin] = now - moved if authors else now
                loss += (now - q[:, i]) ** 2 / u[i, i] ** 2 / 2
                w[:, i:end] -= e[:, i - begin, None] * u[i, i:end] - now[:, None] * p[i, i:end]
            w[:, end:] -= e @ u[begin:end, end:] - latent @ p[begin:end, end:]
        g_idx = torch.arange(n, device=w.device) // g
        back = order.argsort()
        if fixed is None and desc_act:
            g_idx = back // g
        found = fixed if fixed is not None else [chosen[k] for k in range(len(chosen))]
        if fixed is None and act_group_aware:
            found = [chosen[int(k)] for k in (order[::g] // g).argsort()]
        pairs = zip(*found, strict=True) if found else ((), ())
        scale, zero = (torch.stack(x, -1) if found else w.new_zeros(rows, 0) for x in pairs)
        q = torch.where(loss.isfinite()[:, None], q, torch.nan)
        results.append((codes.to(torch.uint8)[:, back], scale, zero, g_idx.int(), q[:, back].to(W.dtype), loss,
                        torch.tensor(info, dtype=torch.int32, device=w.device)))  # fmt: skip
    return QuantizedWeight(*(torch.stack(x).reshape((*lead, *x[0].shape)) for x in zip(*results, strict=True)))


def rtn_quantize(
    W: Tensor, *, bits: int = 4, group_size: int = 128, sym: bool = True, scales: Tensor | None = None,
    zeros: Tensor | None = None, mse: float = 0.0, grid: str = "int", compat: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:  # fmt: skip
    eye = torch.eye(W.shape[-1], dtype=torch.promote_types(W.dtype, torch.float32), device=W.device)
    return gptq_quantize(W, eye, bits=bits, group_size=group_size, sym=sym, scales=scales, zeros=zeros, mse=mse,
                         grid=grid, compat=compat, scale_dtype=scale_dtype, factor=eye)  # fmt: skip


def _factor(h: Tensor, damp: float, dtype: torch.dtype | None) -> tuple[Tensor, bool]:
    """Cholesky, inverse, Cholesky: the upper U with U'U = (H + damp mean(diag H) I)^-1; whether it failed."""
    h = h.to(dtype or h.dtype)
    h = h + damp * h.diagonal().mean() * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        return h, True
    return torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)[0], False


def _unit(w: Tensor) -> Tensor:
    unit = w.abs().amax() / (6 * 448) if w.numel() else w.new_zeros(())
    return torch.where(unit > 0, unit, 1)


def _round_float(x: Tensor, keep: int, smallest_normal: float, spacing: float, highest: float) -> Tensor:
    """To the nearest of a floating-point format, at least its smallest number."""
    exponent = torch.frexp(x)[1] - 1
    step = torch.where(x < smallest_normal, spacing, torch.ldexp(torch.ones_like(x), exponent - keep))
    return (torch.round(x / step) * step).clamp(spacing, highest)


def _round_scale(scale: Tensor, grid: str, dtype: torch.dtype, unit: Tensor) -> Tensor:
    if grid == "nvfp4":
        return _round_float(scale / unit, 3, 2.0**-6, 2.0**-9, 448.0) * unit
    if dtype == torch.float16:
        return _round_float(scale, 10, 2.0**-14, 2.0**-24, 65504.0)
    if dtype == torch.bfloat16:
        return _round_float(scale, 7, 2.0**-126, 2.0**-126, torch.finfo(torch.bfloat16).max)
    return scale.clamp_min(2.0**-126)


def _range(low: Tensor, high: Tensor, bits: int, sym: bool, grid: str, dtype: torch.dtype,
           unit: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(low)
    if grid == "nvfp4":
        return _round_scale(torch.maximum(high, -low) / 6, grid, dtype, unit), zero
    if grid == "mxfp4":
        most = torch.maximum(high, -low)
        power = torch.ldexp(torch.ones_like(most), torch.frexp(most)[1] - 3)
        return torch.where(most == 0, 1, power).clamp_min(2.0**-126), zero
    nothing = (low == 0) & (high == 0)
    low, high = torch.where(nothing, -1, low), torch.where(nothing, 1, high)
    most = 2**bits - 1
    scale = (high - low) / most
    if sym and dtype == torch.float32:  # the lowest number lies halfway between two codes: to the lowest one
        scale = torch.where(low < 0, scale * (1 - 2**-19), scale)
    scale = _round_scale(scale, grid, dtype, unit)
    return scale, zero + (most + 1) / 2 if sym else torch.round(-low / scale).clamp(0, most)


def _find_scale(x: Tensor, bits: int, sym: bool, authors: bool, mse: float, grid: str, dtype: torch.dtype,
                unit: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    if sym or grid != "int":
        high = torch.maximum(high, -low)
        low = torch.where(low < 0, -high, 0) if authors else -high
    scale, zero = _range(low, high, bits, sym, grid, dtype, unit)
    if mse == 0:
        return scale, zero
    best = torch.full_like(scale, torch.inf)
    for i in range(80):
        part = 1 - i / 100
        s, z = _range(part * low, part * high, bits, sym, grid, dtype, unit)
        error = (_round(x, s[:, None], z[:, None], bits, grid)[1] - x).abs().pow(mse).sum(-1)
        scale, zero = torch.where(error < best, s, scale), torch.where(error < best, z, zero)
        best = torch.minimum(best, error)
    return scale, zero


def _round(w: Tensor, scale: Tensor, zero: Tensor, bits: int, grid: str) -> tuple[Tensor, Tensor]:
    if grid == "int":
        code = (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)
        return code, scale * (code - zero)
    ratio = (w / scale).clamp(-6, 6)
    size = ratio.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(w.dtype)
    near = torch.round(size / step) * step
    table = torch.tensor(FP4, dtype=w.dtype, device=w.device)
    index = torch.searchsorted(table, near.contiguous())
    negative = (ratio < 0) & (near > 0)
    return (index + 8 * negative).to(w.dtype), scale * torch.where(negative, -near, near)
