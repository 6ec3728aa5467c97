"""Solutions of sparse optimal transport, one problem after the other, with dense linear algebra in float64."""
from collections.abc import Sequence

import torch
from torch import Tensor

from ..result import STATUS, OTResult, Potentials
from ..sparse_plan import SparsePlan
from ._dense import SemiDual, ascend, newton, quadratic, rounded
from .semidual import costs_of


def solve(M: Tensor | None, a: Tensor | None = None, b: Tensor | None = None, *, reg: float = 1.0,
          max_nz: int | None = None, x: Tensor | None = None, y: Tensor | None = None, alpha0: Tensor | None = None,
          tol: float = 1e-6, max_iter: int = 1000, method: str = "auto", n_len: Tensor | None = None,
          m_len: Tensor | None = None, plan_kind: str = "sparse") -> OTResult:
    """See `gradops.ot.solve`; `alpha0`, `method` and `plan_kind` change nothing, `ties` is not counted, and every
    column has n slots."""
    M = costs_of(M, None if x is None else x.double(), None if y is None else y.double()).double()
    n, m = M.shape[-2:]
    shapes = [M.shape[:-2], *(t.shape[:-1] for t in (a, b) if t is not None),
              *(t.shape for t in (n_len, m_len) if t is not None)]
    batch = torch.broadcast_shapes(*shapes)
    count = M.new_zeros(batch).numel()
    found = []
    for i in range(count):
        rows, cols = (size if t is None else int(t.expand(batch).reshape(-1)[i])
                      for t, size in ((n_len, n), (m_len, m)))
        weights = [None if t is None else t.double().expand(*batch, t.shape[-1]).reshape(-1, t.shape[-1])[i][:size]
                   for t, size in ((a, rows), (b, cols))]
        mass = next((w.sum() for w in weights if w is not None), 1.0)
        left, right = (torch.ones(size).double() * (mass / size) if w is None else w
                       for w, size in zip(weights, (rows, cols), strict=True))
        costs = M.expand(*batch, n, m).reshape(count, n, m)[i, :rows, :cols]
        found.append(_pad(_one(costs, left, right * (left.sum() / right.sum()), reg, max_nz, tol, max_iter), n, m))
    columns = list(zip(*found, strict=True))
    T, alpha, beta = (torch.stack(t).reshape(*batch, *t[0].shape) for t in columns[:3])
    value, dual, gap, error = (torch.tensor(t, dtype=torch.float64).reshape(batch) for t in columns[3:7])
    n_iter, status = (torch.tensor(t).reshape(batch) for t in columns[7:])
    place = torch.arange(n).expand(*batch, m, n)
    return OTResult(SparsePlan(place, T.mT, (*batch, n, m)), value, dual, gap, error, torch.zeros_like(value),
                    Potentials(alpha, beta), n_iter, status)


def _one(M: Tensor, a: Tensor, b: Tensor, reg: float, max_nz: int | None, tol: float, max_iter: int) -> Sequence:
    """Plan, potentials, value, dual value, gap, marginal error, evaluations and status of one problem."""
    bounded = max_nz is not None and max_nz < len(a)
    rows, cols = a > 0, b > 0  # rows and columns without weight leave the problem
    C, left, right = M[rows][:, cols], a[rows], b[cols]
    if not C.isfinite().any(1).all() or not C.isfinite().any(0).all():
        nan = torch.nan
        return (torch.zeros_like(M), torch.full_like(a, nan), torch.full_like(b, nan), nan, nan, nan, nan, 0,
                STATUS.index("infeasible"))
    shift = C.min()  # no test depends on where costs begin
    C = C - shift
    start = torch.where(C.isfinite(), C, 0).sum(1) / C.isfinite().sum(1)
    k = max_nz if bounded else None
    alpha, at, calls = quadratic(start, C, left, right, reg, tol, max_iter)
    if bounded:
        alpha, more = ascend(alpha, C, left, right, reg, int(k or 0), max_iter)
        at, calls = SemiDual(alpha, C, left, right, reg, k), calls + more
    mass = float(left.sum())
    for shrink in (1, 1e-2, 1e-4, 1e-6):
        if not bounded and shrink < 1:
            alpha, at, more = newton(alpha, C, left, right, reg, shrink * tol * mass, max_iter)
            calls += more
        R, met = rounded(at.T, left, right, C.isfinite())
        value = float((R * C)[R > 0].sum() + reg / 2 * (R**2).sum()) if met else torch.inf
        gap = (value - at.value) / max(abs(value), 1e-300) if met else torch.inf
        proven = gap * value <= tol * 1e-3 * max(value, 1e-3 * mass * float(C[C.isfinite()].max()))
        if bounded or proven:
            break
    error = float(at.gradient.abs().sum()) / mass
    good = error <= tol and (bounded or proven)
    status = "converged" if good else "stagnated" if bounded else "iteration_limit" if calls >= max_iter else "stalled"
    T, potentials = torch.zeros_like(M), torch.empty_like(a)
    T[rows.nonzero(), cols.nonzero()[:, 0]] = at.T
    potentials[rows] = alpha
    potentials[~rows] = (M[~rows][:, cols] - shift + at.tau).amin(1)  # the most that leaves the row empty
    beta = torch.empty_like(b)
    beta[cols] = -at.tau
    beta[~cols] = -(potentials[:, None] - (M[:, ~cols] - shift)).amax(0)
    middle = potentials.mean()
    return (T, potentials - middle, beta + middle + shift, value + shift * mass, at.value + shift * mass, gap, error,
            calls, STATUS.index(status))


def _pad(found: Sequence, n: int, m: int) -> Sequence:
    """To the size of the batch, with zeros."""
    T, alpha, beta, *numbers = found
    pad = torch.nn.functional.pad
    return (pad(T, (0, m - T.shape[1], 0, n - T.shape[0])), pad(alpha, (0, n - len(alpha))),
            pad(beta, (0, m - len(beta))), *numbers)
