"""Trains a small transformer on English text with four optimizers, then times the kernels behind them.

The text is Python's own language documentation (`pydoc_data.topics`), read byte by byte. Every run starts from the
same weights and sees the same batches. The matrices of the blocks go to the optimizer of that run; embeddings, the
head and the norms always go to AdamW, as in the Muon and PolarGrad papers.
"""
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from pydoc_data import topics

import matplotlib
import torch
from gradops.bench import harness, report
from gradops.bench.linalg import polar as bench
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from gradops import optim

CONTEXT, BATCH, WIDTH, LAYERS, HEADS = 96, 12, 128, 5, 4

# Learning rates are the best of a sweep over factors of 2 to 4 (validation loss after STEPS steps); those of the
# parameters that are no matrices of a block are the same in every run.
STEPS = 200
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=7.5e-4, betas=(0.9, 0.95), weight_decay=0.1),
    "torch.optim.Muon": lambda ps: torch.optim.Muon(ps, lr=0.04, weight_decay=0.1),
    "gradops Muon": lambda ps: optim.Muon(ps, lr=0.04, weight_decay=0.1, precision="medium"),  # bfloat16, as torch's
    "gradops PolarGrad": lambda ps: optim.PolarGrad(ps, lr=0.4, method="polar_express"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Text:
    """Bytes of the documentation, the last tenth held out for validation."""

    def __init__(self) -> None:
        raw = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
        alphabet, ids = torch.tensor(list(raw)).unique(return_inverse=True)
        self.vocabulary, cut = len(alphabet), len(ids) * 9 // 10
        self.train, self.validation = ids[:cut], ids[cut:]

    @staticmethod
    def batches(ids: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(len(ids) - CONTEXT, (BATCH, 1), generator=generator)
            windows = ids[starts + torch.arange(CONTEXT + 1)]
            yield windows[:, :-1], windows[:, 1:]


@dataclass
class Run:
    name: str
    train: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    optimizer_seconds: float = 0.0


def validation_loss(model: Transformer, text: Text) -> float:
    with torch.no_grad():
        return sum(model(*batch).item() for batch in text.batches(text.validation, 12, seed=2)) / 12


def train(name: str, make: Make, text: Text, steps: int, tick: Callable[[str], None]) -> Run:
    torch.manual_seed(0)
    model, run = Transformer(text.vocabulary), Run(name)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    ours = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ours]
    optimizers = [make(matrices), torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    # Warm up over the first twentieth, then down to a tenth in a straight line.
    shape = lambda i: min((i + 1) / (steps / 20), 1 - 0.9 * i / steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, shape) for o in optimizers]
    start = time.perf_counter()
    for i, batch in enumerate(text.batches(text.train, steps, seed=1)):
        loss = model(*batch)
        loss.backward()
        before = time.perf_counter()
        for o in optimizers:
            o.step()
        run.optimizer_seconds += time.perf_counter() - before
        for o, s in zip(optimizers, schedules, strict=True):
            o.zero_grad()
            s.step()
        run.train.append(loss.item())
        if (i + 1) % max(steps // 4, 1) == 0:
            pause = time.perf_counter()
            run.validation[i + 1] = validation_loss(model, text)
            start += time.perf_counter() - pause  # training time only
        tick(f"{name}: loss {loss.item():.2f}")
    run.seconds = time.perf_counter() - start
    return run


def train_all(text: Text, steps: int) -> list[Run]:
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    runs = []
    with Progress(*columns) as progress:
        for name, make in OPTIMIZERS.items():
            task = progress.add_task(name, total=steps)
            tick = lambda text, task=task: progress.update(task, advance=1, description=text)
            runs.append(train(name, make, text, steps, tick))
    return runs


def recent(losses: list[float]) -> float:
    last = losses[-20:]
    return sum(last) / len(last)


def summary(runs: list[Run]) -> Table:
    out = Table("optimizer", box=None, header_style="bold", pad_edge=False)
    for name in ("train loss", "validation loss", "seconds", "in the optimizer"):
        out.add_column(name, justify="right")
    for r in runs:
        out.add_row(r.name, f"{recent(r.train):.3f}", f"{list(r.validation.values())[-1]:.3f}", f"{r.seconds:.1f}",
                    f"{r.optimizer_seconds:.2f}")  # fmt: skip
    return out


def plot(runs: list[Run], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for r in runs:
        smooth = [recent(r.train[: i + 1]) for i in range(len(r.train))]
        (line,) = axes[0].plot(range(1, len(smooth) + 1), smooth, label=r.name)
        axes[0].plot(list(r.validation), list(r.validation.values()), "o", color=line.get_color(), markersize=4)
        axes[1].plot([r.seconds * (i + 1) / len(smooth) for i in range(len(smooth))], smooth, color=line.get_color())
    axes[0].set(xlabel="step (dots: validation)", ylabel="loss, nats per byte")
    axes[1].set(xlabel="seconds")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def kernels() -> None:
    settings = harness.Settings(quick=True)
    cases = chain(bench.newton_schulz(settings), bench.polar(settings), bench.row_norm(settings))
    report.show(harness.machine(settings), list(harness.run(cases, harness.Floor(settings))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--png", type=Path, default=Path("build/demo.png"))
    options = parser.parse_args()
    if options.steps < 4:
        sys.exit("demo: --steps must be at least 4")
    console, text = Console(), Text()
    size = sum(p.numel() for p in Transformer(text.vocabulary).parameters())
    console.print(f"A transformer of {size / 1e6:.2f} M parameters, {len(text.train)} bytes of text, "
                  f"{options.steps} steps, {torch.get_num_threads()} threads.", highlight=False)  # fmt: skip
    runs = train_all(text, options.steps)
    console.print(summary(runs), highlight=False)
    plot(runs, options.png)
    console.print(f"Curves: {options.png}\n\nThe kernels, on one thread:", highlight=False)
    kernels()


if __name__ == "__main__":
    main()
