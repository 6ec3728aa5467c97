"""Sven, Adam and L-BFGS on three small regressions: loss against epochs and against seconds.

toy         y = exp(-10 x^2) sin(2 x) on [-1, 1]: 10,000 points, a perceptron 1-16-16-16-1 with GELU, batches of 32.
polynomial  all 210 monomials of degree at most 4 in 6 variables, with coefficients drawn N(0, 1), on [-1, 1]^6: 10,000
            points, a perceptron 6-16-16-16-1. (The polynomial of the same name in some published figures of Sven is
            another one: a sum of cubic polynomials of one variable each.)
digits      scikit-learn's 8 x 8 digits: regression on the labels as unit vectors, the loss of a sample being its mean
            squared error over them; a perceptron 64-32-32-32-10, batches of 64.

Targets of the first two are shifted and scaled to mean 0 and variance 1. Sven's settings are those of its authors'
scans; Adam runs at 1e-3. L-BFGS sees all points at once, and each of its evaluations counts as an epoch; it gets ten
times as many. Losses are on points that were not trained on.

    pip install scikit-learn
    python examples/sven/regression.py
"""
import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradops.optim import Sven

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs and targets, to train on and to measure on
Tick = Callable[[], None]
LBFGS_EPOCHS = 10


def points(f: Callable[[Tensor], Tensor], variables: int, generator: torch.Generator) -> Data:
    x = 2 * torch.rand(12_000, variables, generator=generator) - 1
    y = f(x)
    y = (y - y[:10_000].mean()) / y[:10_000].std()
    return x[:10_000], y[:10_000], x[10_000:], y[10_000:]


def toy(generator: torch.Generator) -> Data:
    return points(lambda x: torch.exp(-10 * x**2) * torch.sin(2 * x), 1, generator)


def polynomial(generator: torch.Generator) -> Data:
    monomials = [m for degree in range(5) for m in combinations_with_replacement(range(6), degree)]
    coefficients = torch.randn(len(monomials), generator=generator)

    def f(x: Tensor) -> Tensor:
        values = [x[:, m].prod(1) if m else torch.ones(len(x)) for m in map(list, monomials)]
        return (torch.stack(values, 1) @ coefficients)[:, None]

    return points(f, 6, generator)


def digits(generator: torch.Generator) -> Data:
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    x = torch.from_numpy(pixels).float()[order] / 16
    y = nn.functional.one_hot(torch.from_numpy(labels).long())[order].float()
    return x[:1437], y[:1437], x[1437:], y[1437:]


@dataclass(frozen=True)
class Problem:
    data: Callable[[torch.Generator], Data]
    widths: tuple[int, ...]
    batch: int
    epochs: int
    sven: dict[str, Any]


PROBLEMS = {
    "toy": Problem(toy, (1, 16, 16, 16, 1), 32, 20, {"lr": 0.01, "k": 32, "rtol": 1e-4}),
    "polynomial": Problem(polynomial, (6, 16, 16, 16, 1), 32, 20, {"lr": 0.5, "k": 16, "rtol": 3e-2}),
    "digits": Problem(digits, (64, 32, 32, 32, 10), 64, 40, {"lr": 0.5, "k": 64, "rtol": 1e-3}),
}


@dataclass
class Run:
    problem: str
    optimizer: str
    epochs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def network(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d, p in pairwise(widths):
        layers += [nn.Linear(d, p), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean(1)


def epochs_of(name: str, problem: Problem, model: nn.Module, data: Data, seed: int) -> Callable[[], None]:
    """A function that trains for one epoch."""
    x, y = data[:2]
    shuffle = torch.Generator().manual_seed(seed)
    if name == "L-BFGS":
        lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=8, max_eval=LBFGS_EPOCHS, history_size=20,
                                  line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = per_sample(model(x), y).mean()
            loss.backward()
            return loss

        return lambda: lbfgs.step(closure)
    sven, adam = Sven(model.parameters(), **problem.sven), torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch() -> None:
        for batch in torch.randperm(len(x), generator=shuffle).split(problem.batch):
            if name == "Sven":
                with sven.capture(model):
                    losses = per_sample(model(x[batch]), y[batch])
                sven.step(losses)
            else:
                adam.zero_grad()
                per_sample(model(x[batch]), y[batch]).mean().backward()
                adam.step()

    return epoch


def train(problem_name: str, name: str, seed: int, epochs: int, tick: Tick) -> Run:
    problem = PROBLEMS[problem_name]
    data = problem.data(torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model = network(problem.widths)
    epoch, run, spent = epochs_of(name, problem, model, data, seed), Run(problem_name, name), 0.0
    for i in range(epochs + 1):
        with torch.no_grad():
            run.losses.append(per_sample(model(data[2]), data[3]).mean().item())
        run.epochs.append(i * (LBFGS_EPOCHS if name == "L-BFGS" else 1))
        run.seconds.append(spent)
        if i < epochs:
            began = time.perf_counter()
            epoch()
            spent += time.perf_counter() - began
            tick()
    return run


def train_all(seed: int, epochs: int | None) -> list[Run]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    runs = []
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        for problem_name, problem in PROBLEMS.items():
            for name in ("Sven", "Adam", "L-BFGS"):
                total = epochs or problem.epochs
                task = progress.add_task(f"{problem_name}, {name}", total=total)
                runs.append(train(problem_name, name, seed, total, lambda task=task: progress.advance(task)))
                progress.remove_task(task)
    return runs


def summary(runs: list[Run]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("problem", "optimizer"):
        table.add_column(name)
    for name in ("epochs", "seconds", "loss"):
        table.add_column(name, justify="right")
    for run in runs:
        figures = str(run.epochs[-1]), f"{run.seconds[-1]:.1f}", f"{run.losses[-1]:.2e}"
        table.add_row(run.problem, run.optimizer, *figures)
    return table


def plot(runs: list[Run], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(PROBLEMS), figsize=(11, 6), layout="constrained", sharey="col", squeeze=False)
    for column, problem in enumerate(PROBLEMS):
        for row, unit in enumerate(("epochs", "seconds")):
            axis = axes[row, column]
            for run in runs:
                if run.problem == problem:
                    axis.plot(getattr(run, unit), run.losses, label=run.optimizer)
            axis.set(xlabel=unit, yscale="log", xscale="symlog" if unit == "epochs" else "linear")
            if not row:
                axis.set_title(problem)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("loss")
    axes[0, 0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="of each run (default: 20, 20 and 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the weights and the order (default: 0)")
    parser.add_argument("--plot", type=Path, default=Path("sven_regression.png"), help="where the curves go")
    options = parser.parse_args()
    torch.set_num_threads(1)  # everything here is small
    runs = train_all(options.seed, options.epochs)
    console = Console()
    console.print(summary(runs))
    plot(runs, options.plot)
    console.print(f"curves: {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
