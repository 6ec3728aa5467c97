"""Entropic transport in plain PyTorch: the textbook's log-domain iterations, in float64."""
import torch
from torch import Tensor


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def entropic(M: Tensor, a: Tensor, b: Tensor, *, reg: float, tol: float = 1e-6, max_iter: int = 1000,
             alpha0: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """alpha, beta, the dual value, the L1 error of the marginals over the mass, iterations; of a batch, all at once.

    The value is differentiable once in M, a and b: the potentials are constants in it.
    """
    costs, a, b = M.double(), a.double(), b.double()
    log_a, log_b, c = a.detach().log(), b.detach().log(), costs.detach()
    alpha = torch.zeros_like(log_a) if alpha0 is None else alpha0.double()
    beta = torch.zeros_like(log_b) if alpha0 is None else _step(c.mT, alpha, log_b, reg)
    error = torch.full(a.shape[:-1], torch.inf, dtype=torch.float64)
    for iteration in range(1, max_iter + 1):  # noqa: B007
        alpha = _step(c, beta, log_a, reg)
        beta = _step(c.mT, alpha, log_b, reg)
        t = ((alpha.unsqueeze(-1) + beta.unsqueeze(-2) - c) / reg).exp()
        error = ((t.sum(-1) - a).abs().sum(-1) + (t.sum(-2) - b).abs().sum(-1)).detach() / a.detach().sum(-1)
        if (error <= tol).all():
            break
    t = ((alpha.unsqueeze(-1) + beta.unsqueeze(-2) - costs) / reg).exp()
    linear = alpha.masked_fill(a == 0, 0) * a, beta.masked_fill(b == 0, 0) * b
    return alpha, beta, linear[0].sum(-1) + linear[1].sum(-1) - reg * t.sum((-1, -2)), error, iteration


def _step(c: Tensor, beta: Tensor, log_a: Tensor, reg: float) -> Tensor:
    return reg * (log_a - ((beta.unsqueeze(-2) - c) / reg).logsumexp(-1))
