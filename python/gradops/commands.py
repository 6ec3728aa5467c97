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

NOT_A_FAMILY = {"harness", "peaks", "report"}


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


@gradops.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--bits", type=click.Choice(["2", "3", "4", "8"]), default="4", show_default=True)
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs that share a scale; -1: all.")
@click.option("--method", type=click.Choice(["rtn", "gptq", "gptaq", "foem", "foem+gptaq"]), default="gptq",
              show_default=True)  # fmt: skip
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.txt",
              help="Text to calibrate with; every method but rtn needs it.")  # fmt: skip
@click.option("--desc-act", is_flag=True, help="Inputs with the largest activations first.")
@click.option("--act-group-aware", is_flag=True, help="The same inside groups and between them: no cost in deployment.")
@click.option("--asym", is_flag=True, help="A zero point for every group; written as gptq_v2.")
@click.option("--damp", type=click.FloatRange(0, 1), default=0.01, show_default=True,
              help="Added to Hessians, as a share of the mean of their diagonals.")  # fmt: skip
@click.option("--skip", multiple=True, metavar="PATTERN", help="Also leave these layers alone; may be repeated.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Windows of the text.")
@click.option("--length", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens in a window.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, callback=_check_device)
@click.option("--resume", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Keep the result of every layer here, and go on from what is there.")  # fmt: skip
def quantize(
    model_dir: Path, out_dir: Path, bits: str, group_size: int, method: str, calibration: Path | None, desc_act: bool,
    act_group_aware: bool, asym: bool, damp: float, skip: tuple[str, ...], samples: int, length: int, batch_size: int,
    device: str, resume: Path | None,
) -> None:  # fmt: skip
    """Quantise the model in MODEL_DIR (Hugging Face layout) into OUT_DIR, in the GPTQ format."""
    from .quant import QuantizeConfig, quantize_model, save_quantized

    if calibration is None and method != "rtn":
        raise click.UsageError(f"--method {method} needs --calibration FILE.txt")
    if out_dir.exists() and out_dir.samefile(model_dir):
        raise click.UsageError("OUT_DIR must be another directory than MODEL_DIR")
    try:
        from .quant import _huggingface as huggingface
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        says = f"this command needs {missing}. Install it with: pip install 'gradops[quant]'"
        raise click.ClickException(says) from None
    try:
        config = QuantizeConfig(
            bits=int(bits), group_size=group_size, sym=not asym, method=method, desc_act=desc_act, damp_percent=damp,
            act_group_aware=act_group_aware, skip=(*QuantizeConfig.skip, *skip),
            checkpoint_format="gptq_v2" if asym else "gptq",
        )  # fmt: skip
        batches = []
        if calibration is not None and method != "rtn":
            text = calibration.read_text(encoding="utf-8")
            batches = huggingface.windows(model_dir, text, length=length, samples=samples, batch_size=batch_size)
        model = huggingface.load_model(model_dir).to(device)
        batches = [{name: x.to(device) for name, x in batch.items()} for batch in batches]
        report = quantize_model(model, batches, config, resume=resume)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    huggingface.copy_rest(model_dir, out_dir)
    save_quantized(model, out_dir)
    click.echo(report)
    click.echo(f"written: {out_dir}")
