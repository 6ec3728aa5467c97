"""Policy gradients with verifiable rewards: one small transformer, four ways to turn rewards into advantages.

The question is "a + b + c = ?" modulo a prime. A policy may answer at once, or write the partial sum a + b down first,
which is longer and easier. A transformer is trained here from scratch on examples of both kinds until about a third of
its sampled answers are right. From there on it is rewarded, 1 or 0, for the final answer alone. Every run starts from
the same weights and sees the same questions; a fifth of all questions only serves to measure. For `san` the strata are
the lengths of the answers: answers at once are compared with answers at once.

    python examples/rl/modular_arithmetic.py
"""
import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from gradops import rl

PRIME = 23
EQUALS, STEP, END, PAD = range(PRIME, PRIME + 4)  # tokens; a number is its own token
PROMPT, ANSWER = 4, 4  # lengths: "a b c =", and at most "s ; r end"
WIDTH, LAYERS, HEADS = 96, 2, 4
QUESTIONS, SAMPLES, UPDATES = 48, 8, 2  # of one step: questions, answers to each, updates
SKILL = 0.35  # the share of right answers at which examples end and rewards begin

# The preset of the advantages, and the loss it was published with.
RUNS: dict[str, str] = {"grpo": "grpo", "dr_grpo": "dr_grpo", "rloo": "reinforce", "san": "grpo"}
Tick = Callable[[str], None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(PAD + 1, WIDTH), nn.Embedding(PROMPT + ANSWER, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, PAD + 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]])))


class Questions:
    """Every sum of three numbers modulo PRIME."""

    def __init__(self) -> None:
        numbers = torch.arange(PRIME)
        every = torch.cartesian_prod(numbers, numbers, numbers)
        every = F.pad(every, (0, 1), value=EQUALS)[torch.randperm(len(every), generator=seeded(0))]
        self.train, self.test = every[: len(every) * 4 // 5], every[len(every) * 4 // 5 :]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return self.train[torch.randint(len(self.train), (count,), generator=generator)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def worked_answers(questions: Tensor, stepwise: Tensor) -> Tensor:
    a, b, c, _ = questions.unbind(1)
    partial, total = (a + b) % PRIME, (a + b + c) % PRIME
    step, end, pad = (torch.full_like(a, token) for token in (STEP, END, PAD))
    long, short = torch.stack([partial, step, total, end], 1), torch.stack([total, end, pad, pad], 1)
    return torch.where(stepwise[:, None], long, short)


def reward(questions: Tensor, answers: Tensor) -> Tensor:
    """1 where the last token before the end is the sum, 0 where it is not or the end never came."""
    ended = answers == END
    end = ended.int().argmax(1)
    last = answers.gather(1, (end - 1).clamp_min(0)[:, None])[:, 0]
    return (ended.any(1) & (end > 0) & (last == questions[:, :3].sum(1) % PRIME)).float()


@torch.no_grad()
def sample(policy: Policy, questions: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, the log-probabilities of their tokens, and which tokens were written; greedy without a generator."""
    ids, logps, mask = questions, [], []
    writing = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(ANSWER):
        logits = policy(ids)[:, -1]
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0] if generator else logits.argmax(-1)
        token = torch.where(writing, token, PAD)
        logps.append(rl.selective_log_softmax(logits, token))
        mask.append(writing)
        writing = writing & (token != END)
        ids = torch.cat([ids, token[:, None]], 1)
    return ids[:, PROMPT:], torch.stack(logps, 1), torch.stack(mask, 1)


def accuracy(policy: Policy, questions: Questions, generator: torch.Generator | None = None) -> float:
    return reward(questions.test, sample(policy, questions.test, generator)[0]).mean().item()


def imitate(policy: Policy, questions: Questions, tick: Tick) -> None:
    """Trains on worked answers, half of them stepwise, until the policy has SKILL."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    generator, skill, step = seeded(0), 0.0, 0
    while skill < SKILL:
        q = questions.draw(512, generator)
        answers = worked_answers(q, torch.rand(len(q), generator=generator) < 0.5)
        logits = policy(torch.cat([q, answers], 1))[:, PROMPT - 1 : -1]
        F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=PAD).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            skill = accuracy(policy, questions, seeded(3))
        tick(f"examples: {skill:.0%} right")


@dataclass
class Run:
    name: str
    rewards: list[float] = field(default_factory=list)
    stepwise: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    seconds: float = 0.0


def reinforce(policy: Policy, name: str, questions: Questions, steps: int, tick: Tick) -> Run:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4, weight_decay=0.0)
    generator, run = seeded(1), Run(name)
    start = time.perf_counter()
    for _ in range(steps):
        q = questions.draw(QUESTIONS, generator).repeat_interleave(SAMPLES, 0)
        answers, old_logp, mask = sample(policy, q, generator)
        rewards = reward(q, answers)
        strata: dict[str, Any] = {"strata": mask.sum(1), "alpha": 0.5} if name == "san" else {}
        advantages, _ = rl.group_advantages(rewards, group_size=SAMPLES, preset=name, **strata)
        for part in torch.arange(len(q)).chunk(UPDATES):
            logits = policy(torch.cat([q[part], answers[part]], 1))[:, PROMPT - 1 : -1]
            logp = rl.selective_log_softmax(logits, answers[part])
            more = {"normalizer": len(part) * ANSWER} if name == "dr_grpo" else {}
            loss, _ = rl.policy_loss(logp, old_logp[part], advantages[part], mask=mask[part], kind=RUNS[name], **more)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        run.rewards.append(rewards.mean().item())
        run.stepwise.append((mask.sum(1) == ANSWER).float().mean().item())
        tick(f"{name}: reward {run.rewards[-1]:.2f}")
    run.seconds = time.perf_counter() - start
    run.accuracy = accuracy(policy, questions)
    return run


def train_all(steps: int) -> list[Run]:
    columns = TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    torch.manual_seed(0)
    questions, policy, runs = Questions(), Policy(), []
    with Progress(*columns) as progress:
        task = progress.add_task("examples", total=None)
        imitate(policy, questions, lambda text: progress.update(task, advance=1, description=text))
        progress.stop_task(task)
        for name in RUNS:
            task = progress.add_task(name, total=steps)
            tick = lambda text, task=task: progress.update(task, advance=1, description=text)
            runs.append(reinforce(copy.deepcopy(policy), name, questions, steps, tick))
    return runs


def summary(runs: list[Run]) -> Table:
    table = Table(title="Means of the first and last 20 steps; accuracy: greedy answers, questions never trained on")
    for name in ("advantages", "loss"):
        table.add_column(name)
    for name in ("first rewards", "last rewards", "stepwise", "accuracy", "seconds"):
        table.add_column(name, justify="right")
    for run in runs:
        figures = mean(run.rewards[:20]), mean(run.rewards[-20:]), mean(run.stepwise[-20:]), run.accuracy
        table.add_row(run.name, RUNS[run.name], *(f"{x:.3f}" for x in figures), f"{run.seconds:.1f}")
    return table


def plot(runs: list[Run], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("rewards", "stepwise"), strict=True):
        for run in runs:
            values = torch.tensor(getattr(run, name))
            axis.plot(values.unfold(0, 10, 1).mean(1), label=run.name)
        axis.set(xlabel="step", title={"rewards": "reward", "stepwise": "share of stepwise answers"}[name])
    axes[0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="policy-gradient steps of each run (default: 100)")
    parser.add_argument("--plot", type=Path, default=Path("modular_arithmetic.png"), help="where the curves go")
    options = parser.parse_args()
    runs = train_all(options.steps)
    console = Console()
    console.print(summary(runs))
    plot(runs, options.plot)
    console.print(f"curves: {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
