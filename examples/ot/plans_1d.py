"""Plans between two densities on a line: max_nz = 1, 2 and 4, quadratic and entropic regularisation.

Columns are points of the lower density; each sends its mass to the rows that are dark in its column. With few entries
per column the plan is a curve a few points wide; quadratic regularisation makes a band, entropic regularisation is
positive everywhere. The residual is that of the row marginals: columns sum to their mass to a few ulp, rows with
max_nz below the natural width of the band do not (docs/sparse_transport.md).

    python examples/ot/plans_1d.py
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gradops import ot

METHODS = {"max_nz = 1": 1, "max_nz = 2": 2, "max_nz = 4": 4, "quadratic": None, "entropic": 0}


def bump(t: Tensor, mean: float, width: float) -> Tensor:
    p = torch.exp(-0.5 * ((t - mean) / width) ** 2)
    return p / p.sum()


def plans(n: int, reg: float, entropic_reg: float) -> tuple[Tensor, Tensor, dict[str, ot.OTResult]]:
    t = torch.arange(n, dtype=torch.float64) * (32 / n)
    a = bump(t, 16, 5)
    b = (bump(t, 8, 3) + bump(t, 24, 3)) / 2
    M = (t[:, None] - t) ** 2
    M /= M.max()
    found = {}
    for name, max_nz in METHODS.items():
        if max_nz == 0:
            found[name] = ot.entropic(M, a, b, reg=entropic_reg)
        else:
            found[name] = ot.solve(M, a, b, reg=reg, max_nz=max_nz)
    return a, b, found


def plot(a: Tensor, b: Tensor, found: dict[str, ot.OTResult], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n = len(a)
    figure, axes = plt.subplots(1, len(found), figsize=(3 * len(found), 3.4), layout="constrained")
    for axis, (name, result) in zip(axes, found.items(), strict=True):
        axis.imshow(result.plan.to_dense() ** 0.5, cmap="Greys", interpolation="nearest")
        axis.fill_betweenx(range(n), -1, -1 - a * n * 2, color="tab:blue", alpha=0.6, clip_on=False)
        axis.fill_between(range(n), n, n + b * n * 2, color="tab:red", alpha=0.6, clip_on=False)
        axis.set(xlim=(-n / 5, n), ylim=(n * 1.2, -1), xticks=[], yticks=[], frame_on=False)
        axis.set_title(f"{name}\nrows off by {float(result.marginal_err):.0e}", fontsize=10)
    figure.savefig(file, dpi=120, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=64, help="of each density (default: 64)")
    parser.add_argument("--reg", type=float, default=0.1, help="quadratic, for all but the last (default: 0.1)")
    parser.add_argument("--entropic-reg", type=float, default=2e-3, help="(default: 0.002)")
    parser.add_argument("--plot", type=Path, default=Path("ot_plans_1d.png"), help="where the figure goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    a, b, found = plans(options.points, options.reg, options.entropic_reg)
    columns = ("plan", "entries", "most in a column", "<T, M> + ...", "rows off by", "status")
    table = Table(*columns, box=None, pad_edge=False)
    for name, result in found.items():
        entries = (result.plan.to_dense() > 0).sum(0)
        table.add_row(name, str(int(entries.sum())), str(int(entries.max())), f"{float(result.value):.5f}",
                      f"{float(result.marginal_err):.1e}", str(result.status))
    console = Console()
    console.print(table)
    plot(a, b, found, options.plot)
    console.print(f"figure: {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
