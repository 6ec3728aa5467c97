"""hessian_update_, gptaq_cross_update_ and hessian_factor as one writes them down."""
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
    some = n_new.clamp_min(1)[..., None, None]
    H.mul_((n_new - which.sum(-1))[..., None, None] / some).add_(left.mT @ right * (2 / some))
    return n_new if mask is not None or isinstance(n_seen, Tensor) else n_seen + tokens


def hessian_factor(H: Tensor, *, damp_percent: float = 0.01, damp_auto_increment: float = 0.0,
                   factor_dtype: torch.dtype | None = None, inverse: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Three factorisations, item by item."""
    dtype = factor_dtype or H.dtype
    n = H.shape[-1]
    results = [_factor(h.to(dtype), damp_percent, damp_auto_increment, inverse) for h in H.reshape(-1, n, n)]
    if not results:
        results = [(H.new_empty(n, n, dtype=dtype), 0.0, 0)]
    factors, damps, infos = zip(*results, strict=True)
    count = H.shape[:-2].numel()
    return (torch.stack(factors)[:count].reshape(H.shape), torch.tensor(damps[:count], dtype=torch.float64,
            device=H.device).reshape(H.shape[:-2]),
            torch.tensor(infos[:count], dtype=torch.int32, device=H.device).reshape(H.shape[:-2]))  # fmt: skip


def _factor(H: Tensor, damp: float, increment: float, inverse: bool) -> tuple[Tensor, float, int]:
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    if not bool(H.isfinite().all()):
        return identity, float("nan"), -1
    diagonal = H.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    info = 2 if bool(dead.all()) else 1 if bool(dead.any()) else 0
    H = H + torch.diag(dead.to(H.dtype))
    k = 0
    while True:
        percent = damp + k * increment
        damped = H + percent * mean * identity
        L, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            if not inverse:  # the Cholesky factor of the matrix read backwards
                return torch.linalg.cholesky(damped.flip(-1, -2)).flip(-1, -2), percent, info
            return torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True), percent, info
        k += 1
        if increment <= 0 or damp + k * increment > 1:
            return identity, float("nan"), -2
