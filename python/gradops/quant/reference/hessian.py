"""hessian_update_, gptaq_cross_update_ and hessian_factor as one writes them down."""
import itertools

import torch
from torch import Tensor


def hessian_update_(H: Tensor, X: Tensor, n_seen: int | Tensor, *, mask: Tensor | None = None,
                    precision: str = "highest") -> int | Tensor:
    return _update(H, X, X, n_seen, mask)


def gptaq_cross_update_(D: Tensor, X_fp: Tensor, X_q: Tensor, n_seen: int | Tensor, *, mask: Tensor | None = None,
                        precision: str = "highest") -> int | Tensor:
    return _update(D, X_fp.to(D.dtype) - X_q.to(D.dtype), X_q, n_seen, mask)


def _update(H: Tensor, left: Tensor, right: Tensor, n_seen: int | Tensor, mask: Tensor | None) -> int | Tensor:
    batch, n = H.shape[:-2], H.shape[-1]
    tokens = left.shape[len(batch):-1].numel()
    left = left.to(H.dtype).reshape(*batch, tokens, n)
    right = right.to(H.dtype).reshape(*batch, tokens, n)
    which = torch.ones(left.shape[:-1], dtype=torch.bool, device=H.device)
    if mask is not None:
        which = mask.reshape(which.shape)
        left, right = left.where(which[..., None], 0), right.where(which[..., None], 0)
    n_new = n_seen + which.sum(-1)
    some = n_new.clamp_min(1)[..., None, None].to(H.dtype)
    kept = (some - which.sum(-1)[..., None, None]) / some
    H.mul_(kept).add_(left.mT @ right * (2 / some))
    return n_new if mask is not None or isinstance(n_seen, Tensor) else n_seen + tokens


def hessian_factor(H: Tensor, *, damp_percent: float = 0.01, damp_auto_increment: float = 0.0,
                   factor_dtype: torch.dtype | None = None, inverse: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Three factorisations, item by item."""
    dtype = factor_dtype or H.dtype
    factor = torch.empty_like(H, dtype=dtype, memory_format=torch.contiguous_format)
    damp = H.new_empty(H.shape[:-2], dtype=torch.float64)
    info = H.new_empty(H.shape[:-2], dtype=torch.int32)
    for i in itertools.product(*map(range, H.shape[:-2])):
        factor[i], damp[i], info[i] = _factor(H[i].to(dtype), damp_percent, damp_auto_increment, inverse)
    return factor, damp, info


def _factor(H: Tensor, damp: float, increment: float, inverse: bool) -> tuple[Tensor, float, int]:
    identity, none = torch.eye(len(H), dtype=H.dtype, device=H.device), float("nan")
    if not bool(H.isfinite().all()):
        return identity, none, 2
    dead = H.diagonal() == 0
    if len(H) and bool(dead.all()):
        return identity, none, 3
    H = H + torch.diag(dead.to(H.dtype))
    k = 0
    while k == 0 or (increment > 0 and damp + k * increment <= 1):
        percent = damp + k * increment
        damped = H + percent * H.diagonal().mean() * identity
        L, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            if not inverse:  # the Cholesky factor of the matrix read backwards
                factor = torch.linalg.cholesky(damped.flip(-1, -2)).flip(-1, -2)
            else:
                factor = torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
            return factor, percent, -int(dead.sum())
        k += 1
    return identity, none, 1
