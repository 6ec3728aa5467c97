"""PolarGrad on the matrix quadratic of its paper: min_X 1/2 ||A X B - C||_F^2.

The problem, seed and settings are those of Lau, Long and Su, "PolarGrad: A Class of Matrix-Gradient Optimizers from a
Unifying Preconditioning Perspective" (arXiv 2505.21799, section 6): A 1000x500, B 100x250, C 1000x250, all drawn
N(0, 1) in float32 from seed 42 in this order; X 500x100 drawn U(-1, 1) from the same seed again. The run itself is in
float64: at this learning rate a relative perturbation of 1e-7 of the gradient moves the gap at step 200 by about 1 %,
so that a float32 run depends on the order in which the machine sums.

    python examples/polargrad_quadratic.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gradops.optim import PolarGrad

CHECKPOINTS = (0, 50, 100, 200)


def two_step_qdwh(a: Tensor) -> Tensor:
    """The paper's inexact oracle: two QDWH steps from the lower bound l = eps, then one Newton-Schulz step.

    Two steps do not converge from that bound (orthogonality error about 0.2), which is part of the setting: with an
    exact oracle the same learning rate gives other figures. The bound is float32's eps in any dtype.
    """
    if a.shape[-2] < a.shape[-1]:
        return two_step_qdwh(a.mT).mT
    n = a.shape[-1]
    one_norm, inf_norm = a.abs().sum(-2).amax(-1), a.abs().sum(-1).amax(-1)
    x = a / (one_norm * inf_norm).sqrt()[..., None, None]
    eye = torch.eye(n, dtype=a.dtype, device=a.device).expand(*a.shape[:-2], n, n)
    low = torch.finfo(torch.float32).eps
    for _ in range(2):
        square = low * low
        d = (4 * (1 / square - 1) / square) ** (1 / 3)
        root = math.sqrt(1 + d)
        alpha = root + math.sqrt(2 - d + 2 * (2 - square) / (square * root))
        beta = (alpha - 1) ** 2 / 4
        gamma = alpha + beta - 1
        # X (alpha I + beta X'X)(I + gamma X'X)^-1, the inverse taken through a QR of [sqrt(gamma) X; I].
        q = torch.linalg.qr(torch.cat([math.sqrt(gamma) * x, eye], dim=-2)).Q
        q1, q2 = q[..., :-n, :], q[..., -n:, :]
        x = beta / gamma * x + (alpha - beta / gamma) / math.sqrt(gamma) * (q1 @ q2.mT)
        low = low * (alpha + beta * square) / (1 + gamma * square)
    return 1.5 * x - 0.5 * x @ (x.mT @ x)


def problem(seed: int = 42) -> tuple[Tensor, Tensor, Tensor, float]:
    """A, B, C and the optimal value."""
    torch.manual_seed(seed)
    a, b, c = (torch.randn(*shape).double() for shape in ((1000, 500), (100, 250), (1000, 250)))
    x = torch.linalg.lstsq(b.mT, torch.linalg.lstsq(a, c).solution.mT).solution.mT
    return a, b, c, 0.5 * (a @ x @ b - c).square().sum().item()


def run(
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], checkpoints: tuple[int, ...] = CHECKPOINTS
) -> dict[int, float]:
    """Objective gap f(X_k) - f* at each k in `checkpoints`."""
    a, b, c, optimum = problem()
    torch.manual_seed(42)
    x = torch.nn.Parameter(torch.empty(500, 100).uniform_(-1, 1).double())
    opt = optimizer([x])
    gaps = {}
    for k in range(max(checkpoints) + 1):
        opt.zero_grad()
        loss = 0.5 * (a @ x @ b - c).square().sum()
        if k in checkpoints:
            gaps[k] = loss.item() - optimum
        loss.backward()
        opt.step()
    return gaps


RUNS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "PolarGrad, QDWH in 2 steps, lr 4e-8": lambda p: PolarGrad(p, lr=4e-8, momentum=0.0, method=two_step_qdwh),
    "PolarGrad, exact polar, lr 3e-8": lambda p: PolarGrad(p, lr=3e-8, momentum=0.0),
    "PolarGradM 0.9, QDWH in 2 steps, lr 4e-8": lambda p: PolarGrad(p, lr=4e-8, momentum=0.9, method=two_step_qdwh),
    "Adam, lr 0.05": lambda p: torch.optim.Adam(p, lr=0.05),
}


if __name__ == "__main__":
    print(f"{'objective gap at step':42}" + "".join(f"{k:>12}" for k in CHECKPOINTS))
    for name, make in RUNS.items():
        print(f"{name:42}" + "".join(f"{gap:12.5g}" for gap in run(make).values()))
