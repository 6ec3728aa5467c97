"""Projection onto sparse vectors of the simplex, with torch.topk."""
import torch
from torch import Tensor


def sparse_simplex_projection(X: Tensor, max_nz: int | None = None, z: float | Tensor = 1.0, dim: int = -1
                              ) -> tuple[Tensor, Tensor, Tensor]:
    """See `gradops.ot.sparse_simplex_projection`; equal entries may be chosen among differently."""
    X = X.movedim(dim, -1)
    k = X.shape[-1] if max_nz is None else min(max_nz, X.shape[-1])
    top, indices = X.topk(k, dim=-1)
    z = torch.as_tensor(z, dtype=X.dtype, device=X.device)[..., None]
    thresholds = (top.cumsum(-1) - z) / torch.arange(1, k + 1, device=X.device)
    size = (top >= thresholds).sum(-1, keepdim=True).clamp(min=1)
    tau = thresholds.gather(-1, size - 1)
    values = (top - tau).clamp(min=0)
    indices, order = indices.sort(-1)
    return values.gather(-1, order).movedim(-1, dim), indices.movedim(-1, dim), tau.squeeze(-1)
