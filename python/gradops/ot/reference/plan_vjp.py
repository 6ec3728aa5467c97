"""The plan's answer at fixed support, with dense linear algebra."""
import torch
from torch import Tensor


def plan_vjp(index: Tensor, value: Tensor, g: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One problem after the other: the normal equations of the Laplacian by its eigenvectors."""
    m, n = index.shape[-2], p.shape[-1]
    rs: list[Tensor] = []
    us: list[Tensor] = []
    vs: list[Tensor] = []
    for rows, t, x, row, col in zip(index.reshape(-1, m, index.shape[-1]), value.reshape(-1, m, index.shape[-1]),
                                    g.reshape(-1, m, index.shape[-1]), p.reshape(-1, n), q.reshape(-1, m), strict=True):
        column, place = (t > 0).nonzero(as_tuple=True)
        edge = torch.zeros(len(column), n + m, dtype=torch.float64)  # one row per entry: its marginals
        edge[torch.arange(len(column)), rows[column, place]] = 1
        edge[torch.arange(len(column)), n + column] = 1
        laplacian = edge.T @ edge
        x = x[column, place]
        uv = torch.linalg.pinv(laplacian, rtol=1e-11, hermitian=True) @ (edge.T @ x + torch.cat([row, col]))
        for nodes in _components(laplacian):  # u + c, v - c solve it too
            here = nodes[nodes < n]
            shift = uv[here].mean() if len(here) else 0
            uv[here] -= shift
            uv[nodes[nodes >= n]] += shift
        r = torch.zeros_like(t)
        r[column, place] = x - edge @ uv
        for out, x in ((rs, r), (us, uv[:n]), (vs, uv[n:])):
            out.append(x)
    return torch.stack(rs).reshape(g.shape), torch.stack(us).reshape(p.shape), torch.stack(vs).reshape(q.shape)


def _components(laplacian: Tensor) -> list[Tensor]:
    reach = ((laplacian != 0) | torch.eye(len(laplacian), dtype=torch.bool)).double()
    for _ in range(len(laplacian).bit_length()):
        reach = (reach @ reach > 0).double()
    return [row.nonzero()[:, 0] for row in reach.unique(dim=0)]
