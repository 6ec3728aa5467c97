"""Peaks of memory of gradients and of products with a Hessian, one call each in a process of its own, on Linux:

    python -m gradops.bench.peaks
"""
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gradops import curvature

from .curvature import models as m
from .curvature import scaled_dot_product_attention as a

Route = Callable[[Any], object]
ours = curvature.scaled_dot_product_attention


def attention_routes(time: int) -> dict[str, tuple[Callable[[bool], Any], Route]]:
    def make(small: bool) -> a.Problem:
        return a.Problem(64 if small else time)

    routes: dict[str, Route] = {
        "gradient, torch's flash": lambda p: a.gradient(p, a.plain), "gradient": lambda p: a.gradient(p, ours),
        "jvp(grad)": lambda p: a.jvp_grad(p, ours), "double backward": lambda p: a.double_backward(p, ours),
        "hvp": lambda p: curvature.hvp(lambda x: p.loss(ours)(*x), p.x, p.v),
        "double backward, torch's MATH": lambda p: a.double_backward(p, a.math),
    }  # fmt: skip
    return {name: (make, route) for name, route in routes.items()}


def model_routes(make: Callable[[bool], m.Problem]) -> dict[str, tuple[Callable[[bool], Any], Route]]:
    def in_context(p: m.Problem) -> object:
        with curvature.second_order_kernels():
            return curvature.hvp(p.loss, p.params, p.v)

    routes: dict[str, Route] = {
        "gradient, torch's flash": lambda p: m.gradient(p)(), "hvp, second_order_kernels": in_context,
        "hvp": lambda p: curvature.hvp(p.loss, p.params, p.v),
        "jvp(grad), torch": lambda p: m.jvp(m.grad(p.loss), (p.params,), (p.v,)),
    }  # fmt: skip
    return {name: (make, route) for name, route in routes.items()}


CASES = {
    **{f"attention T={time}": attention_routes(time) for time in (512, 1024, 2048)},
    "MLP": model_routes(lambda small: m.perceptron(64 if small else 1024, 64 if small else 1024, "cpu")),
    "GPT": model_routes(lambda small: m.gpt(1 if small else 4, "cpu")),
}


def status(key: str) -> float:  # MB
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) / 1024


def rise(make: Callable[[bool], Any], route: Route) -> float:
    route(make(True))  # what a first call loads
    problem = make(False)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    route(problem)
    return status("VmHWM") - before


def main() -> None:
    if sys.argv[1:]:
        case, name = sys.argv[1:]
        print(rise(*CASES[case][name]))
        return
    table = Table("case", "route", "peak, MB", "times a gradient's")
    for case, routes in CASES.items():
        first = 0.0
        for name in routes:
            run = subprocess.run([sys.executable, "-m", __spec__.name, case, name], capture_output=True, text=True,
                                 check=True)
            peak = float(run.stdout)
            first = first or peak
            table.add_row(case, name, f"{peak:.1f}", f"{peak / first:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
