"""The commands behind `gradops`."""
import pkgutil
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import bench as benchmarks
from . import info as facts

NOT_A_FAMILY = {"harness", "report"}


def families() -> list[str]:
    """Every module of gradops.bench that declares cases."""
    return sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in NOT_A_FAMILY)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("gradops"), "-V", "--version", prog_name="gradops")
def gradops() -> None:
    """Fast kernels for gradient methods, on CPU and CUDA."""


@gradops.command()
def info() -> None:
    """Show versions, what is in use on this machine, and what is not and why."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = list(facts.rows())
    for row in rows:
        table.add_row(*row)
    Console().print(table, highlight=False)
    if any(value.startswith("error:") for _, value in rows):
        raise SystemExit(1)


def _check_families(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = set(names) - set(families())
    if unknown:
        raise click.BadParameter(f"no family {', '.join(sorted(unknown))}; there are {', '.join(families())}")
    return names or tuple(families())


def _check_device(context: click.Context, parameter: click.Parameter, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch finds no GPU here")
    return device


@gradops.command()
@click.argument("family", nargs=-1, callback=_check_families)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, callback=_check_device)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads.")
@click.option("--quick", is_flag=True, help="A few shapes, short bursts: a smoke test, not a measurement.")
@click.option("--only", metavar="TEXT", default="", help="Only the cases whose name contains TEXT.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a plot here.")
def bench(
    family: tuple[str, ...], device: str, threads: int, quick: bool, only: str, json_file: Path | None,
    plot_file: Path | None,
) -> None:  # fmt: skip
    """Measure ours, plain torch, the peers and the floor, for every FAMILY or the named ones."""
    from .bench import harness, report

    settings = harness.Settings(device, threads, quick)
    machine, floor = harness.machine(settings), harness.Floor(settings)
    results = []
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        for name in family:
            cases = import_module(f".bench.{name}", __package__).cases(settings)
            chosen = (case for case in cases if only in case.name)
            for result in harness.run(chosen, floor):
                results.append(result | {"family": name})
                progress.update(task, description=f"measured {result['name']}")
                if json_file:  # after every case, so that an interrupted run keeps what it measured
                    report.write_json(json_file, machine, results)
    if not results:
        raise click.UsageError(f"no case's name contains {only!r}")
    report.show(machine, results)
    if plot_file:
        report.write_plot(plot_file, machine, results)
    if any("failed" in result for result in results):
        raise SystemExit(1)
