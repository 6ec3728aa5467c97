"""A physics-informed network for the Poisson equation in one dimension, trained by Sven with two filters and by Adam.

    -u'' = f on (0, 1), u(0) = u(1) = 0, with the solution u = sin(pi x) + sin(4 pi x) / 4.

Every row of the Jacobian is one point: the residual -u'' - f inside, 10 u at an end. They are passed to Sven as they
are, with their signs, so that a step at lr = 1 is that of Gauss and Newton: with the hard filter (the truncated
pseudoinverse) or with the tikhonov filter (Levenberg-Marquardt). The network carries u, u' and u'' from layer to layer
(Taylor mode), three tokens that go through each weight together; taking u'' by differentiating the network again would
use the weights outside of their layers, where their per-sample gradients are not known. All of it is in float64.

    python examples/sven/pinn.py
"""
import argparse
import itertools
import sys
import time
from collections.abc import Callable
from math import pi
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from gradops.optim import Sven

WIDTH, DEPTH, POINTS = 24, 3, 128
Step = Callable[[nn.Module, Tensor], None]


class Taylor(nn.Module):
    """A tanh network of one variable: the value and two derivatives, (points, 3)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1] + [WIDTH] * DEPTH + [1]
        # A constant feature stands for the bias: its derivatives are zero, unlike those of a bias.
        self.layers = nn.ModuleList(nn.Linear(d + 1, p, bias=False) for d, p in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        h = torch.stack([x, one, zero], 1)[..., None]  # points, derivatives, features
        constant = torch.stack([one, zero, zero], 1)[..., None]
        for i, layer in enumerate(self.layers):
            if i:
                t = torch.tanh(h[:, :1])
                slope = 1 - t**2
                first, second = h[:, 1:2], h[:, 2:]
                h = torch.cat([t, slope * first, slope * second - 2 * t * slope * first**2], 1)
            h = layer(torch.cat([h, constant], 2))
        return h[..., 0]


def solution(x: Tensor) -> Tensor:
    return torch.sin(pi * x) + torch.sin(4 * pi * x) / 4


def source(x: Tensor) -> Tensor:
    return pi**2 * torch.sin(pi * x) + 4 * pi**2 * torch.sin(4 * pi * x)


def residuals(model: nn.Module, x: Tensor) -> Tensor:
    u = model(x)
    return torch.where((x == 0) | (x == 1), 10 * u[:, 0], -u[:, 2] - source(x)) / len(x) ** 0.5


def sven(model: nn.Module, steps: int, **settings: object) -> Callable[[Tensor], None]:
    opt = Sven(model.parameters(), **settings)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.05, 1.0, max(1, steps // 5))

    def step(x: Tensor) -> None:
        with opt.capture(model):
            rows = residuals(model, x)
        opt.step(rows)
        schedule.step()

    return step


def adam(model: nn.Module, steps: int) -> Callable[[Tensor], None]:
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)

    def step(x: Tensor) -> None:
        opt.zero_grad()
        residuals(model, x).square().sum().backward()
        opt.step()
        schedule.step()

    return step


RUNS: dict[str, tuple[int, Callable[[nn.Module, int], Callable[[Tensor], None]]]] = {
    "Sven, hard": (1, lambda model, steps: sven(model, steps, lr=0.3)),
    "Sven, tikhonov": (1, lambda model, steps: sven(model, steps, lr=1.0, filter="tikhonov", damping=1e-3)),
    "Adam": (10, adam),  # ten times as many steps
}


def train(make: Callable[[nn.Module, int], Callable[[Tensor], None]], steps: int, seed: int,
          tick: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Seconds and relative errors of u, every twentieth of the way."""
    torch.manual_seed(seed)
    model = Taylor().double()
    step, spent = make(model, steps), 0.0
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    seconds, errors = [], []
    for i in range(steps + 1):
        if i % max(1, steps // 20) == 0:
            with torch.no_grad():
                error = (model(grid)[:, 0] - solution(grid)).norm() / solution(grid).norm()
            seconds.append(spent), errors.append(error.item()), tick()
        began = time.perf_counter()
        x = torch.rand(POINTS, dtype=torch.float64)
        x[0], x[1] = 0, 1
        step(x)
        spent += time.perf_counter() - began
    return seconds, errors


def plot(curves: dict[str, tuple[list[float], list[float]]], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, (seconds, errors) in curves.items():
        axis.plot(seconds, errors, label=name)
    axis.set(xlabel="seconds", ylabel="relative error of u", yscale="log")
    axis.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of Sven; Adam takes ten times as many (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the points (default: 0)")
    parser.add_argument("--plot", type=Path, default=Path("sven_pinn.png"), help="where the curves go")
    options = parser.parse_args()
    torch.set_num_threads(1)  # everything here is small
    curves, table = {}, Table("optimizer", "steps", "seconds", "relative error of u", box=None, pad_edge=False)
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        for name, (factor, make) in RUNS.items():
            task = progress.add_task(name, total=21)
            steps = factor * options.steps
            curves[name] = train(make, steps, options.seed, lambda task=task: progress.advance(task))
            table.add_row(name, str(steps), f"{curves[name][0][-1]:.1f}", f"{curves[name][1][-1]:.1e}")
    console = Console()
    console.print(table)
    plot(curves, options.plot)
    console.print(f"curves: {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
