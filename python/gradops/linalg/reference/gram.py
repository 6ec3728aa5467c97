"""Gram matrices, and least squares through them."""
from collections.abc import Sequence

import torch
from torch import Tensor


def _blocks(J: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [J] if isinstance(J, Tensor) else list(J)


def gram(J: Tensor | Sequence[Tensor], *, accumulate: torch.dtype | None = None) -> Tensor:
    dtype = accumulate or torch.float64
    return torch.stack([x.to(dtype) @ x.to(dtype).mT for x in _blocks(J)]).sum(0)


def jt_apply(J: Tensor | Sequence[Tensor], w: Tensor) -> Tensor | list[Tensor]:
    out = [(x.double().mT @ w.double()[..., None])[..., 0].to(x.dtype) for x in _blocks(J)]
    return out[0] if isinstance(J, Tensor) else out


def spectral_solve(G: Tensor, r: Tensor, *, k: int | None = None, rtol: float = 1e-3, atol: float = 1e-10,
                   filter: str = "hard", damping: float = 0.0, power: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """One item after the other, and within it one eigenvalue after the other."""
    n = G.shape[-1]
    if G.numel() == 0:
        return r.new_zeros(r.shape).double(), r.new_zeros(r.shape).double(), r.new_zeros(r.shape[:-1]).long()
    ws, sigmas, ranks = [], [], []
    for g, x in zip(G.reshape(-1, n, n).double(), r.reshape(-1, n).double(), strict=True):
        w, sigma, rank = torch.zeros_like(x), torch.full_like(x, torch.nan), -1
        if not (g.isfinite().all() and x.isfinite().all()):
            w[:] = torch.nan
        else:
            values, q = torch.linalg.eigh(g)
            values, q, rank = values.flip(-1).clamp_min(0), q.flip(-1), 0
            sigma = values.sqrt()
            for i in range(n if k is None else min(k, n)):
                s, value = sigma[i], values[i]
                above = bool(s > rtol * sigma[0] and s > atol)
                if filter == "hard":
                    factor = float(above)
                elif filter == "smooth":
                    factor = 1 / (1 + (rtol**2 * values[0] / value)**6) if s > atol else 0.0
                else:
                    factor = 1.0
                rank += above
                if factor and value + damping > 0 and (value > 0 or power <= 1):
                    w += factor * s**(1 - power) / (value + damping) * (q[:, i] @ x) * q[:, i]
        ws.append(w)
        sigmas.append(sigma)
        ranks.append(rank)
    return (torch.stack(ws).reshape(r.shape), torch.stack(sigmas).reshape(r.shape),
            torch.tensor(ranks, device=G.device).reshape(r.shape[:-1]))


def pinv_apply(J: Tensor | Sequence[Tensor], r: Tensor, *, k: int | None = None, rtol: float = 1e-3,
               method: str = "auto") -> Tensor | list[Tensor]:
    """By the SVD; `method` makes no difference here."""
    whole = torch.cat(_blocks(J), -1).double()
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    keep = s > rtol * s[..., :1]
    keep[..., slice(k, None) if k is not None else slice(0, 0)] = False
    y = (u.mT @ r.double()[..., None])[..., 0] * torch.where(keep, 1 / torch.where(keep, s, 1), 0)
    d = (vh.mT @ y[..., None])[..., 0]
    out = [x.to(b.dtype) for x, b in zip(d.split([b.shape[-1] for b in _blocks(J)], -1), _blocks(J), strict=True)]
    return out[0] if isinstance(J, Tensor) else out
