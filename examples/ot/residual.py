"""What max_nz costs: dual value and row residual over max_nz, for points in the plane.

From the natural support on (the widest column of the quadratic plan) the constraint does not bind: the answer is the
quadratic one and its rows hold. Below, the dual has a kink at its maximum, and between the dual's maximum and the best
plan with max_nz entries per column there is in general a gap: the sparse plan misses the row marginals however long one
solves. What can be had instead is the plan of the convex relaxation (plan_kind="averaged"), which meets the rows with
some more entries. One entry per column on an assignment problem is the exception: there the relaxation is exact.

    python examples/ot/residual.py
"""
import argparse
from pathlib import Path

import matplotlib
import torch

from gradops import ot


def problem(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, dtype=torch.float64, generator=g)
    y = torch.randn(n, 2, dtype=torch.float64, generator=g) + torch.tensor([2.0, 0.0], dtype=torch.float64)
    M = torch.cdist(x, y) ** 2
    return M / M.max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--reg", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("residual.png"))
    options = parser.parse_args()

    M = problem(options.n)
    quadratic = ot.solve(M, reg=options.reg)
    natural = int((quadratic.plan.to_dense() > 0).sum(0).max())
    counts = list(range(1, natural + 3))
    sparse = [ot.solve(M, reg=options.reg, max_nz=k) for k in counts]
    averaged = [ot.solve(M, reg=options.reg, max_nz=k, plan_kind="averaged") for k in counts]
    print(f"natural support: {natural} entries in the widest column")
    print("max_nz  dual value  bound - dual  rows, sparse  rows, averaged  entries/column  status")
    for k, s, r in zip(counts, sparse, averaged, strict=True):
        entries = float((r.plan.to_dense() > 0).sum()) / options.n
        print(f"{k:6d}  {float(s.dual_value):10.7f}  {float(s.value - s.dual_value):12.1e}"
              f"  {float(s.marginal_err):12.1e}  {float(r.marginal_err):14.1e}  {entries:14.2f}  {s.status}")

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    top.plot(counts, [float(s.dual_value) for s in sparse], "o-", label="dual value, max_nz")
    top.axhline(float(quadratic.dual_value), color="grey", linestyle=":", label="quadratic")
    top.set_ylabel("dual value")
    floor = 1e-16  # a logarithm cannot show 0
    bottom.semilogy(counts, [max(float(s.marginal_err), floor) for s in sparse], "o-", label='plan_kind="sparse"')
    bottom.semilogy(counts, [max(float(r.marginal_err), floor) for r in averaged], "s--", label='plan_kind="averaged"')
    bottom.set_ylabel("row residual / mass")
    bottom.set_xlabel("max_nz")
    for axis in (top, bottom):
        axis.axvline(natural, color="tab:red", linewidth=1, label="natural support")
        axis.legend()
    figure.suptitle(f"{options.n} points to {options.n} points, reg = {options.reg:g}")
    figure.savefig(options.out, dpi=120)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
