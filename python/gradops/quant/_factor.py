"""The factor of the Hessian."""
import torch
from torch import Tensor

NOT_DEFINITE, NOT_FINITE, UNSEEN = 1, 2, 3  # info


def factor(H: Tensor, *, damp_percent: float, damp_auto_increment: float,
           factor_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """U upper with U'U = (H + damp mean(diag H) I)^-1, the damping used, and info: 0, -k if k inputs were never seen,
    or why U is the identity. With J reversing the order, J H J = L L' gives U = J L^-1 J."""
    h = H.to(factor_dtype or H.dtype)
    diagonal = h.diagonal(0, -2, -1)
    dead = diagonal == 0
    count, eye = dead.sum(-1), torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    finite = h.isfinite().all(-1).all(-1)
    info = torch.where(finite, torch.where(dead.all(-1), UNSEEN, -count), NOT_FINITE).int()
    mean, damp = (diagonal + dead).mean(-1), torch.full_like(count, damp_percent, dtype=h.dtype)

    def attempt() -> tuple[Tensor, Tensor]:
        damped = h + torch.diag_embed(dead + (damp * mean)[..., None])
        lower, failed = torch.linalg.cholesky_ex(torch.where((info > 0)[..., None, None], eye, damped).flip(-2, -1))
        return lower, failed > 0

    lower, failed = attempt()
    while damp_auto_increment > 0 and bool((failed & (damp + damp_auto_increment <= 1)).any()):
        damp = torch.where(failed, damp + damp_auto_increment, damp)
        again, still = attempt()
        lower, failed = torch.where(failed[..., None, None], again, lower), failed & still
    info = torch.where(failed, NOT_DEFINITE, info)
    lower = torch.where((info > 0)[..., None, None], eye, lower)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).flip(-2, -1), damp, info
