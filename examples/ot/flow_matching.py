"""Flow matching in two dimensions, with independent and with optimal couplings of the minibatches.

A small network v(x, t) learns to carry a Gaussian to eight others: it is fitted to x1 - x0 at (1 - t) x0 + t x1, for
pairs (x0, x1). With pairs drawn independently, paths cross and the flow bends; with pairs drawn from a plan between the
two halves of a batch it is nearly straight (Tong et al. 2024, Pooladian et al. 2023), so that few Euler steps suffice.
Plans of many batches are solved in one call: by quadratic regularisation, from whose columns partners are drawn, or
with max_nz=1, where each point has one partner.

    python examples/ot/flow_matching.py
"""
import argparse
import sys
import time
from math import pi
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from gradops import ot

COUPLINGS = ("independent", "quadratic", "max_nz = 1")
AHEAD = 10  # batches whose plans are solved in one call


def source(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape, 2)


def target(shape: tuple[int, ...]) -> Tensor:
    angle = torch.randint(8, shape) * (pi / 4)
    return 4 * torch.stack([angle.cos(), angle.sin()], -1) + 0.3 * torch.randn(*shape, 2)


def pair(x: Tensor, y: Tensor, coupling: str) -> Tensor:
    """x (batches, size, 2) in the order of its partners in y."""
    if coupling == "independent":
        return x
    result = ot.solve(None, x=x, y=y, reg=0.1 * x.shape[-2], max_nz=1 if coupling == "max_nz = 1" else None, tol=1e-3)
    values, indices = result.plan.values, result.plan.indices
    drawn = torch.multinomial(values.flatten(0, -2), 1).reshape(*values.shape[:-1], 1)
    return x.gather(-2, indices.gather(-1, drawn).expand(x.shape))


def train(coupling: str, steps: int, size: int, seed: int) -> tuple[nn.Module, float, float]:
    """The network, the seconds spent on it, and those spent on couplings."""
    torch.manual_seed(seed)
    v = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    opt = torch.optim.Adam(v.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    began, coupled = time.perf_counter(), 0.0
    for step in range(steps):
        if step % AHEAD == 0:
            start = time.perf_counter()
            ys = target((AHEAD, size))
            xs = pair(source((AHEAD, size)), ys, coupling)
            coupled += time.perf_counter() - start
        x, y, t = xs[step % AHEAD], ys[step % AHEAD], torch.rand(size, 1)
        loss = (v(torch.cat([(1 - t) * x + t * y, t], 1)) - (y - x)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return v, time.perf_counter() - began - coupled, coupled


@torch.no_grad()
def flow(v: nn.Module, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The paths (steps + 1, points, 2) of Euler's method, and the energy of each."""
    path, energy = [x], torch.zeros(len(x))
    for k in range(steps):
        speed = v(torch.cat([path[-1], torch.full((len(x), 1), k / steps)], 1))
        energy += speed.square().sum(1) / steps
        path.append(path[-1] + speed / steps)
    return torch.stack(path), energy


def distance(x: Tensor, y: Tensor) -> float:
    """The energy distance of two samples."""
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def plot(paths: dict[str, Tensor], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(paths), figsize=(4 * len(paths), 4.2), layout="constrained")
    for axis, (name, path) in zip(axes, paths.items(), strict=True):
        axis.plot(path[:, :, 0], path[:, :, 1], color="tab:grey", alpha=0.4, linewidth=0.6)
        axis.scatter(*path[0].T, s=4, color="tab:blue")
        axis.scatter(*path[-1].T, s=4, color="tab:red")
        axis.set(title=name, aspect="equal", xticks=[], yticks=[])
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of training (default: 1500)")
    parser.add_argument("--size", type=int, default=128, help="of a batch (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--plot", type=Path, default=Path("ot_flow_matching.png"), help="where the paths go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # everything here is small
    heads = ("couplings", "s, training", "s, couplings", "bend", "error, 2 steps", "error, 100 steps")
    paths, table = {}, Table(*heads, box=None, pad_edge=False)
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        for name in progress.track(COUPLINGS):
            v, trained, coupled = train(name, options.steps, options.size, options.seed)
            torch.manual_seed(options.seed + 1)
            x, y = source((1000,)), target((1000,))
            path, energy = flow(v, x, 100)
            straight = (path[-1] - path[0]).square().sum(1)
            two = distance(flow(v, x, 2)[0][-1], y)
            table.add_row(name, f"{trained:.1f}", f"{coupled:.1f}", f"{energy.mean() / straight.mean() - 1:.1%}",
                          f"{two:.4f}", f"{distance(path[-1], y):.4f}")
            paths[name] = path[:, :200]
    console = Console()
    console.print(table)
    console.print("bend: the energy of the paths over that of straight ones between the same ends, less 1;\n"
                  "error: the energy distance of 1000 points carried along, to 1000 of the target")
    plot(paths, options.plot)
    console.print(f"paths: {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
