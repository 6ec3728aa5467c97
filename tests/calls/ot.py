import torch

from gradops import ot

from . import Call


def weights(count):
    return torch.arange(1, count + 1, dtype=torch.float64) / 10


def semidual(x):
    n, m = x.shape[-2:]
    value, grad, plan, tau = ot.semidual(x[..., 0], x, weights(n), weights(m), 0.7, 3)
    return value + (grad * weights(n)).sum(-1) + (tau * plan.values[..., 0]).sum(-1)


def semidual_raw(x):
    n, m = x.shape[-2:]
    batch = x.shape[:-2]
    return (x[..., 0].double(), x, None, None, weights(n).expand(*batch, n), weights(m).expand(*batch, m), 0.7, 3, 3,
            *(None,) * 4)


def solve(x):
    n, m = x.shape[-2:]
    batch = x.shape[:-2]
    return (x, None, None, torch.full((*batch, n), 1 / n, dtype=torch.float64),
            torch.full((*batch, m), 1 / m, dtype=torch.float64), None, None, None, 0.7, 0, 1e-6, 1e-9, 1000, n)


CALLS = {
    "solve": Call(solve, lambda x: ot.solve(x, reg=0.7).value, derivatives=0),
    "semidual": Call(semidual_raw, semidual),
}
