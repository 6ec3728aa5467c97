"""One dense problem in float64: the semi-dual, Newton's method on it, rounding to a plan with both marginals."""
from math import ceil, log

import torch
from torch import Tensor


def project(X: Tensor, mass: Tensor, max_nz: int | None = None) -> tuple[Tensor, Tensor]:
    """Of every column of X its ``max_nz`` largest numbers (ties to the lowest row), moved down by tau and cut at 0
    so that they sum to ``mass``: what is left, and tau."""
    values, rows = X.sort(dim=0, descending=True, stable=True)
    values = values[:max_nz]
    count = torch.arange(1, len(values) + 1, dtype=X.dtype)[:, None]
    level = (values.cumsum(0) - mass) / count
    last = (values > level).sum(0, keepdim=True) - 1
    tau = level.gather(0, last.clamp_min(0))[0]
    return torch.zeros_like(X).scatter(0, rows[:max_nz], (values - tau).clamp_min(0)), tau


class SemiDual:
    """D, its gradient, the plan and tau at alpha."""

    def __init__(self, alpha: Tensor, M: Tensor, a: Tensor, b: Tensor, reg: float, max_nz: int | None = None) -> None:
        scaled, self.tau = project(alpha[:, None] - M, reg * b, max_nz)
        self.T = scaled / reg
        self.gradient = a - self.T.sum(1)
        at = self.T > 0
        self.value = float(alpha @ a - (self.T * (alpha[:, None] - M))[at].sum() + reg / 2 * (self.T**2).sum())


def newton(alpha: Tensor, M: Tensor, a: Tensor, b: Tensor, reg: float, tol: float, budget: int,
           ) -> tuple[Tensor, SemiDual, int]:
    """Semismooth Newton with the damping of Levenberg and Marquardt, until sum |T 1 - a| <= tol; D is concave, so a
    step that still points uphill at its end has gone up."""
    at, calls, damping = SemiDual(alpha, M, a, b, reg), 1, 0.1
    while at.gradient.abs().sum() > tol and calls < budget and damping < 1e12:
        s = (at.T > 0).double()
        degree = s.sum(1)
        laplacian = degree.diag() - (s / s.sum(0)) @ s.T
        empty = degree == 0  # rows that no column wants: each is moved to where it gets its weight
        added = damping * min(1.0, float(at.gradient.abs().sum())) * degree.mean().clamp_min(1)
        right = torch.where(empty, 0, reg * at.gradient)
        step = torch.linalg.solve(laplacian + (added + empty).diag(), right)
        if empty.any():
            step[empty] = -project(-at.tau[:, None] - M[empty].T, reg * a[empty])[1] - alpha[empty]
        new = SemiDual(alpha + step, M, a, b, reg)
        calls += 1
        rise, slope = float(at.gradient @ step), float(new.gradient @ step)
        if slope >= 0 or new.value >= at.value + 1e-4 * rise + 1e-15 * abs(at.value) or (
                abs(slope) <= rise / 2 and abs(new.value - at.value) <= 1e-14 * abs(at.value)):
            alpha, at, damping = alpha + step, new, max(damping / 4, 1e-10)
        else:
            damping *= 8
    return alpha, at, calls


def quadratic(alpha: Tensor, M: Tensor, a: Tensor, b: Tensor, reg: float, tol: float, budget: int,
              ) -> tuple[Tensor, SemiDual, int]:
    """From a regularisation under which nearly everything is in the support, down by factors of four."""
    mass, finite = float(a.sum()), M[M.isfinite()]
    start = max(reg, 0.1 * M.numel() * float(finite.max() - finite.min()) / mass)
    levels, calls = ceil(log(start / reg) / log(4) - 1e-9), 0
    for k in range(levels, 0, -1):
        alpha, _, used = newton(alpha, M, a, b, reg * (start / reg)**(k / levels), 0.02 * mass, budget - calls)
        calls += used
    alpha, at, used = newton(alpha, M, a, b, reg, tol * mass, budget - calls)
    return alpha, at, calls + used


def ascend(alpha: Tensor, M: Tensor, a: Tensor, b: Tensor, reg: float, max_nz: int, budget: int) -> tuple[Tensor, int]:
    """L-BFGS with halved steps, and then steps along subgradients of decreasing length: the best alpha of all, and how
    often D was evaluated."""
    at, calls = SemiDual(alpha, M, a, b, reg, max_nz), 1
    pairs: list[tuple[Tensor, Tensor]] = []
    while calls < budget // 2:
        step, coefficients = at.gradient.clone(), []
        for s, y in reversed(pairs):
            coefficients.append((s @ step) / (s @ y))
            step -= coefficients[-1] * y
        if pairs:
            step *= (pairs[-1][0] @ pairs[-1][1]) / (pairs[-1][1] @ pairs[-1][1])
        for (s, y), c in zip(pairs, reversed(coefficients), strict=True):
            step += (c - (y @ step) / (s @ y)) * s
        length, rise = 1.0, float(at.gradient @ step)
        while calls < budget and length > 1e-9:
            new, calls = SemiDual(alpha + length * step, M, a, b, reg, max_nz), calls + 1
            if new.value >= at.value + 1e-4 * length * rise:
                break
            length /= 2
        else:
            break
        s, y = length * step, at.gradient - new.gradient
        pairs = (pairs + [(s, y)] if s @ y > 0 else pairs)[-20:]
        alpha, at = alpha + s, new
    best, x, length = (at.value, alpha), alpha, 0.1 * reg * float(b.mean())
    for k in range(calls, budget):
        if not at.gradient.any():
            break
        x = x + length * (budget / (1 + k))**0.5 * at.gradient / at.gradient.norm()
        at = SemiDual(x, M, a, b, reg, max_nz)
        best = max(best, (at.value, x), key=lambda pair: pair[0])
    return best[1], max(calls, budget)


def rounded(T: Tensor, a: Tensor, b: Tensor, allowed: Tensor) -> tuple[Tensor, bool]:
    """A plan near T (Altschuler, Weed and Rigollet 2017), what is missing filled in from the north-west corner where
    it is allowed; and whether it has both marginals."""
    T = T * torch.where(T.sum(1) > a, a / T.sum(1), 1)[:, None]
    T = T * torch.where(T.sum(0) > b, b / T.sum(0), 1)
    missing_a, missing_b = (a - T.sum(1)).clamp_min(0), (b - T.sum(0)).clamp_min(0)
    for i in range(len(a)):
        for j in (allowed[i] & (missing_b > 0)).nonzero()[:, 0].tolist():
            mass = torch.minimum(missing_a[i], missing_b[j])
            T[i, j] += mass
            missing_a[i] -= mass
            missing_b[j] -= mass
            if missing_a[i] <= 0:
                break
    return T, bool(missing_a.sum() <= 1e-14 * a.sum())
