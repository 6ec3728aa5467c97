"""Entropic transport in plain PyTorch: the textbook's log-domain iterations, in float64."""
import torch
from torch import Tensor

from ..dense_plan import DensePlan
from ..result import STATUS, OTResult, Potentials


def entropic(M: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None, *, reg: float = 0.05,
             x: Tensor | None = None, y: Tensor | None = None, alpha0: Tensor | None = None, tol: float = 1e-6,
             max_iter: int = 1000, n_len: Tensor | None = None, m_len: Tensor | None = None) -> OTResult:
    """A batch runs until all its problems are done; nothing is checked. Costs past a length must be finite.

    The value is differentiable once: the potentials are constants in it.
    """
    if M is None:
        assert x is not None and y is not None
        M = (x.double().unsqueeze(-2) - y.double().unsqueeze(-3)).square().sum(-1)
    costs = M.double()
    a, b = _weights(a, costs.shape[:-1], n_len), _weights(b, (*costs.shape[:-2], costs.shape[-1]), m_len)
    c, log_a, log_b, mass = costs.detach(), a.detach().log(), b.detach().log(), a.detach().sum(-1)
    alpha = torch.zeros_like(log_a) if alpha0 is None else alpha0.double()
    beta = torch.zeros_like(log_b) if alpha0 is None else _step(c.mT, alpha, log_b, reg)
    for n_iter in range(1, max_iter + 1):  # noqa: B007
        alpha = _step(c, beta, log_a, reg)
        beta = _step(c.mT, alpha, log_b, reg)
        plan = DensePlan(c, None, alpha, beta, reg)
        t = plan.to_dense()
        error = ((t.sum(-1) - a).abs().sum(-1) + (t.sum(-2) - b).abs().sum(-1)).detach() / mass
        if (error <= tol).all():
            break
    rounded = _rounded(t, a.detach(), b.detach())
    gap = (torch.special.xlogy(rounded, rounded / t) - rounded + t).nan_to_num(0.0).sum((-1, -2)) / mass
    linear = (alpha.masked_fill(a == 0, 0) * a).sum(-1) + (beta.masked_fill(b == 0, 0) * b).sum(-1)
    dual_value = linear - reg * DensePlan(costs, None, alpha, beta, reg).to_dense().sum((-1, -2))
    code = torch.where(error <= tol, STATUS.index("converged"), STATUS.index("iteration_limit"))
    return OTResult(plan, dual_value + reg * mass * gap, dual_value.detach(), gap, error, torch.zeros_like(error),
                    Potentials(alpha, beta), torch.full_like(code, n_iter), code)


def _weights(w: Tensor | None, shape: tuple[int, ...], length: Tensor | None) -> Tensor:
    if length is None:
        return torch.full(shape, 1 / shape[-1], dtype=torch.float64) if w is None else w.double().expand(shape)
    used = torch.arange(shape[-1]) < length.unsqueeze(-1)
    return torch.where(used, 1 / length.unsqueeze(-1).double() if w is None else w.double(), 0.0)


def _step(c: Tensor, beta: Tensor, log_a: Tensor, reg: float) -> Tensor:
    return reg * (log_a - ((beta.unsqueeze(-2) - c) / reg).logsumexp(-1))


def _rounded(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """To both marginals: Altschuler, Weed and Rigollet's Algorithm 2."""
    t = t * (a / t.sum(-1)).nan_to_num(0.0).clamp(max=1).unsqueeze(-1)
    t = t * (b / t.sum(-2)).nan_to_num(0.0).clamp(max=1).unsqueeze(-2)
    rows, columns = a - t.sum(-1), b - t.sum(-2)
    fill = rows.unsqueeze(-1) * columns.unsqueeze(-2) / rows.sum(-1)[..., None, None]
    return t + fill.nan_to_num(0.0)
