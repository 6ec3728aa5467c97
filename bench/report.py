"""Shows what the harness measured: a table, a JSON file, a plot."""
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def table(results: list[Result]) -> Table:
    """One line per shape. A line that plain torch wins is marked, never left out."""
    peers = sorted({name for r in results for name in r["ratios"]} - {"torch"})
    out = Table(box=None, header_style="bold", pad_edge=False)
    out.add_column("op")
    out.add_column("shape", justify="right", no_wrap=True)
    out.add_column("dtype", no_wrap=True)
    for name in ["ours ms", "torch ms", "x torch", *(f"x {peer}" for peer in peers), "floor ms", "of floor",
                 "error", "torch's error"]:  # fmt: skip
        out.add_column(name, justify="right")
    for r in results:
        ours, theirs, ratio = r["seconds"]["ours"], r["seconds"].get("torch"), r["ratios"].get("torch")
        mark = "[red]{} lost[/]" if r["lost"] else "{}"
        out.add_row(
            f"{r['op']} {r['variant']}".strip(), r["shape"], r["dtype"], milliseconds(ours), milliseconds(theirs),
            "" if ratio is None else mark.format(f"{ratio:.2f}"),
            *(f"{r['ratios'][p]:.2f}" if p in r["ratios"] else "" for p in peers),
            milliseconds(r["floor"] or None), f"{r['of_floor']:.0%}" if r["floor"] else "",
            *(f"{r['errors'][who]:.1e}" if who in r["errors"] else "" for who in ("ours", "torch")),
        )  # fmt: skip
    return out


def legend(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    return (
        f"{machine.get('gpu', machine['cpu'])}, ISA level {machine['isa']}, "
        f"{threads} thread{'s' if threads > 1 else ''}, torch {machine['torch']}, {machine['clock']}. "
        "Medians; ratios are taken pair by pair (above 1: ours is faster). Errors are against float64."
    )


def show(machine: dict[str, Any], results: list[Result]) -> None:
    console = Console()
    if not console.is_terminal:  # a log file has no width
        console = Console(width=160)
    failed = [r for r in results if "failed" in r]
    results = [r for r in results if "failed" not in r]
    for _, group in groupby(results, key=lambda r: r["op"].split()[0]):  # peers differ: one table would be too wide
        console.print(table(list(group)), "")
    console.print(legend(machine), style="dim", highlight=False)
    lost = sum(r["lost"] for r in results)
    if lost:
        console.print(f"{lost} of {len(results)} cases are slower than plain torch.", style="red")
    for r in failed:
        console.print(f"{r['name']} failed: {r['failed']}", style="red", highlight=False, markup=False)


def write_json(path: Path, machine: dict[str, Any], results: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def write_plot(path: Path, machine: dict[str, Any], results: list[Result]) -> None:
    """Bars of the ratio to plain torch, one per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in results if "torch" in r.get("ratios", ())][::-1]
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.24 * len(shown)), layout="constrained")
    ratios = [r["ratios"]["torch"] for r in shown]
    bars = ax.barh([r["name"] for r in shown], ratios, color=["tab:red" if r["lost"] else "tab:blue" for r in shown])
    ax.bar_label(bars, labels=[f" {x:.2f}" for x in ratios], fontsize=7)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xlabel("times faster than plain torch")
    ax.tick_params(axis="y", labelsize=7)
    ax.margins(y=0.01)
    ax.set_title(machine.get("gpu", machine["cpu"]), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)
