"""A small mixture of experts on scikit-learn's 8 x 8 digits, under six ways to route: accuracy, balance, losses.

A token is an image, a group is a batch of 256 of them. 64 pixels go through one linear layer, a mixture of 8 experts
(perceptrons 64-32-64, two for each token) beside a residual connection, and a linear head. All start alike.

transport, tokens choose     gradops.ot.router, top_k=2
transport, experts choose    gradops.ot.router, mode="experts_choose"
softmax top-2                the two largest gates
softmax top-2, balance loss  the same and 0.01 x experts x sum of (share of the tokens x mean gate) in the loss
Sinkhorn top-2               the two largest entries of exp(logits) after Sinkhorn's scalings, gates of the softmax
dense                        no experts: one perceptron as wide as two of them

An expert takes at most 1.25 times its even share (the capacity); of more, those that want it most. Figures are over
test images, in groups of 180: load is what experts are asked for, max / mean, before capacity; dropped are
images that no expert took. Assignments depend on the group in all but the softmax.

    pip install scikit-learn
    python examples/moe/digits.py
"""
import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradops.ot import router

EXPERTS, TOP_K, WIDTH, GROUP, FACTOR = 8, 2, 64, 256, 1.25
# Of logits (T, E) and capacity or None: indices (T, k) of experts or (E, capacity) of tokens, with -1 for none; weights
Route = Callable[[Tensor, int | None], tuple[Tensor, Tensor]]


def transport_tokens(logits: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    return router(logits, top_k=TOP_K, capacity=capacity)[:2]


def transport_experts(logits: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    return router(logits, capacity=capacity or share(len(logits)), mode="experts_choose")[:2]


def softmax_top_k(logits: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    gates = logits.softmax(-1)
    weights, indices = gates.topk(TOP_K)
    return refuse(indices, gates.detach(), capacity), weights


def sinkhorn_top_k(logits: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    plan = logits.detach().log_softmax(-1)
    for _ in range(20):
        plan = (plan - plan.logsumexp(0)).log_softmax(-1)
    indices = plan.topk(TOP_K).indices
    return refuse(indices, plan.exp(), capacity), logits.softmax(-1).gather(-1, indices)


ROUTES: dict[str, Route | None] = {
    "transport, tokens choose": transport_tokens, "transport, experts choose": transport_experts,
    "softmax top-2": softmax_top_k, "softmax top-2, balance loss": softmax_top_k, "Sinkhorn top-2": sinkhorn_top_k,
    "dense": None,
}  # fmt: skip


def share(tokens: int) -> int:
    """Tokens an expert may have."""
    return math.ceil(FACTOR * tokens * TOP_K / EXPERTS)


def refuse(indices: Tensor, wish: Tensor, capacity: int | None) -> Tensor:
    """-1 where an expert has more tokens than its capacity, for those that wish it least."""
    if capacity is None:
        return indices
    chosen = torch.zeros_like(wish).scatter(-1, indices, wish.gather(-1, indices))
    rank = chosen.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return torch.where(rank.gather(-1, indices) < capacity, indices, -1)


class Mixture(nn.Module):
    def __init__(self, route: Route, experts_choose: bool) -> None:
        super().__init__()
        self.route, self.experts_choose = route, experts_choose
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(perceptron(WIDTH // 2) for _ in range(EXPERTS))
        self.balance_loss = torch.zeros(())
        self.load = self.taken = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        indices, weights = self.route(logits, share(len(x)))
        out, self.taken = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.int64)
        for e, expert in enumerate(self.experts):
            if self.experts_choose:
                slot, = (indices[e] >= 0).nonzero(as_tuple=True)
                token, weight = indices[e, slot], weights[e, slot]
            else:
                token, slot = (indices == e).nonzero(as_tuple=True)
                weight = weights[token, slot]
            out = out.index_add(0, token, weight[:, None] * expert(x[token]))
            self.taken[token] += 1
        if not self.training:  # what the experts are asked for
            asked = self.route(logits, None)[0]
            asked = (asked >= 0).nonzero()[:, 0] if self.experts_choose else asked[asked >= 0]
            self.load = torch.bincount(asked, minlength=EXPERTS)
        frequency = torch.bincount(logits.topk(TOP_K).indices.flatten(), minlength=EXPERTS) / (len(x) * TOP_K)
        self.balance_loss = EXPERTS * (frequency * logits.softmax(-1).mean(0)).sum()
        return out


def perceptron(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        route = ROUTES[name]
        self.first, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.middle = Mixture(route, "experts" in name) if route else perceptron(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(x + self.middle(x))


@dataclass
class Run:
    accuracy: float = 0.0
    loads: Tensor = field(default_factory=lambda: torch.zeros(EXPERTS))  # mean over groups, of sorted loads / mean load
    balance: float = 1.0
    dropped: float = 0.0
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)  # accuracy, epoch by epoch


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.from_numpy(pixels).float()[order] / 16, torch.from_numpy(labels)[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


@torch.no_grad()
def judge(model: Model, x: Tensor, y: Tensor, run: Run) -> None:
    model.eval()
    right, loads, dropped = 0, [], 0
    for images, labels in zip(x.split(180), y.split(180), strict=True):
        right += int((model(images).argmax(-1) == labels).sum())
        if isinstance(model.middle, Mixture):
            loads.append(model.middle.load / model.middle.load.float().mean())
            dropped += int((model.middle.taken == 0).sum())
    run.accuracy, run.dropped = right / len(x), dropped / len(x)
    run.curve.append(run.accuracy)
    if loads:
        run.loads = torch.stack(loads).sort(descending=True).values.mean(0)
        run.balance = float(run.loads[0])
    model.train()


def train(name: str, seed: int, epochs: int) -> Run:
    x, y, *test = data(seed)
    torch.manual_seed(seed)
    model, run = Model(name), Run()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        began = time.perf_counter()
        for batch in torch.randperm(len(x), generator=shuffle).split(GROUP):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            if "balance" in name:
                loss = loss + 0.01 * model.middle.balance_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.seconds += time.perf_counter() - began
        judge(model, *test, run)
    return run


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def summary(runs: dict[str, list[Run]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("router")
    for column in ("accuracy", "max / mean load", "dropped", "seconds"):
        table.add_column(column, justify="right")
    for name, seeds in runs.items():
        accuracy, seconds = mean([r.accuracy for r in seeds]), mean([r.seconds for r in seeds])
        balance, dropped = mean([r.balance for r in seeds]), mean([r.dropped for r in seeds])
        routed = (f"{balance:.2f}", f"{dropped:.2%}") if ROUTES[name] else ("-", "-")
        table.add_row(name, f"{accuracy:.2%}", *routed, f"{seconds:.1f}")
    return table


def plot(runs: dict[str, list[Run]], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loads, curves) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (name, seeds) in enumerate(runs.items()):
        if ROUTES[name]:
            heights = torch.stack([r.loads for r in seeds]).mean(0)
            loads.bar(torch.arange(EXPERTS) + (i - 2) * 0.16, heights, 0.16, label=name)
        accuracy = torch.tensor([r.curve for r in seeds]).mean(0)
        color = None if ROUTES[name] else "black"
        curves.plot(torch.arange(1, len(accuracy) + 1), 1 - accuracy, label=name, color=color)
    loads.axhline(FACTOR, color="grey", linewidth=0.8, linestyle="dashed")
    loads.text(EXPERTS - 0.5, FACTOR + 0.02, "capacity", ha="right", color="grey")
    loads.set(xlabel="experts, busiest first", ylabel="load / mean load", xticks=[])
    curves.set(xlabel="epochs", ylabel="errors on test images", yscale="log")
    curves.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="of each run (default: 30)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each router (default: 5)")
    parser.add_argument("--plot", type=Path, default=Path("moe_digits.png"), help="where the figure goes")
    parser.add_argument("--quick", action="store_true", help="two epochs, one seed")
    options = parser.parse_args()
    epochs, seeds = (2, 1) if options.quick else (options.epochs, options.seeds)
    torch.set_num_threads(1)  # everything here is small
    runs = {name: [train(name, seed, epochs) for seed in range(seeds)] for name in ROUTES}
    Console().print(summary(runs))
    plot(runs, options.plot)
    print(f"figure: {options.plot}")


if __name__ == "__main__":
    main()
