"""Quadratic transport in plain PyTorch, for one small problem."""
import torch
from torch import Tensor


def _threshold(x: Tensor, mass: Tensor) -> Tensor:
    """tau_j with sum_i (x_ij - tau_j)_+ = mass_j."""
    sorted_x = x.sort(dim=0, descending=True).values
    tau = (sorted_x.cumsum(0) - mass) / torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)[:, None]
    return tau.gather(0, (sorted_x > tau).sum(0, keepdim=True) - 1)[0]


def solve(M: Tensor, a: Tensor, b: Tensor, *, reg: float, tol: float = 1e-9) -> tuple[Tensor, Tensor, Tensor]:
    """The plan (n, m), alpha and beta of quadratically regularised transport, all weights positive.

    Semismooth Newton with dense Hessians along a path of falling reg, halving steps that do not ascend.
    """
    M, a, b = M.double(), a.double(), b.double()
    alpha = M.mean(1)
    size = reg
    while size < float(M.max() - M.min()) * M.numel() / float(a.sum()):
        size *= 4

    def evaluate(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = alpha[:, None] - M
        tau = _threshold(x, size * b)
        plan = (x - tau).clamp(min=0) / size
        return alpha @ a - (plan * (x - 0.5 * size * plan)).sum(), plan, tau

    while True:
        for _ in range(200):
            value, plan, tau = evaluate(alpha)
            gradient = a - plan.sum(1)
            error = float(gradient.abs().sum() / a.sum())
            if error <= tol:
                break
            support = (plan > 0).double()
            laplacian = support.sum(1).diag() - support @ (support / support.sum(0)).T
            laplacian += min(1.0, error) * 1e-3 * torch.eye(len(a), dtype=torch.float64)
            step = torch.linalg.solve(laplacian, size * gradient)
            while float(step.abs().max()) > 1e-15 and (
                evaluate(alpha + step)[0] < value - 1e-14 * value.abs()
                and (a - evaluate(alpha + step)[1].sum(1)) @ step < 0
            ):
                step = step / 2
            alpha = alpha + step
        if size <= reg:
            return plan, alpha, -tau
        size = max(size / 4, reg)
