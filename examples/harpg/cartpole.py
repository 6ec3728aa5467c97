"""Policy gradients on CartPole: REINFORCE, N-PG-IGT, HARPG and N-HARPG, at the same number of episodes.

Fifty-odd lines of torch are the environment: the equations of Barto, Sutton and Anderson (1983) with Gymnasium's
constants, all episodes of a batch at once. The policy is a perceptron; the return is undiscounted up to `--horizon`,
its greatest value. HARPG spends half of its episodes on Hessian-vector products at a point between the last two
parameters, N-PG-IGT all of them on gradients ahead of the parameters.

Learning rates are the best of a small sweep. Episodes are long and few, so that a product with the Hessian, in which
every gradient is multiplied with the score of its whole episode, is noisy: steps must be short, and the corrected
methods do not catch up with REINFORCE on a task as easy as this one. Normalised steps bear the noise far better.

    python examples/harpg/cartpole.py
"""
import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradops import curvature, optim

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, STEP = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
MAX_POSITION, MAX_ANGLE = 2.4, 12 * math.pi / 180


class Batch(NamedTuple):
    """All steps of all episodes, one after the other, and the return of each episode."""

    observations: Tensor
    actions: Tensor
    weights: Tensor
    episodes: Tensor
    returns: Tensor


def advance(state: Tensor, action: Tensor) -> Tensor:
    """The next (position, velocity, angle, angular velocity) of every cart, by Euler's method."""
    x, speed, angle, spin = state.unbind(1)
    force = (2 * action - 1) * FORCE
    sine, cosine, mass = angle.sin(), angle.cos(), CART + POLE
    push = (force + POLE * HALF_LENGTH * spin**2 * sine) / mass
    turn = (GRAVITY * sine - cosine * push) / (HALF_LENGTH * (4 / 3 - POLE * cosine**2 / mass))
    pull = push - POLE * HALF_LENGTH * turn * cosine / mass
    return torch.stack([x + STEP * speed, speed + STEP * pull, angle + STEP * spin, spin + STEP * turn], 1)


@torch.no_grad()
def sample(policy: nn.Module, episodes: int, horizon: int, generator: torch.Generator) -> Batch:
    state = torch.empty(episodes, 4).uniform_(-0.05, 0.05, generator=generator)
    alive = torch.arange(episodes)
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for t in range(horizon):
        right = (torch.rand(len(alive), generator=generator) < policy(state).softmax(-1)[:, 1]).long()
        seen.append((state, right, alive, torch.full_like(alive, t)))
        state = advance(state, right)
        up = (state[:, 0].abs() <= MAX_POSITION) & (state[:, 2].abs() <= MAX_ANGLE)
        state, alive = state[up], alive[up]
        if not len(alive):
            break
    observations, actions, ids, times = (torch.cat(parts) for parts in zip(*seen, strict=True))
    returns = torch.bincount(ids, minlength=episodes).float()
    # A reward of 1 for every step, so the return from t on; less its mean over the episodes that got as far (itself
    # among them, which is a little biased, as is usual).
    to_go = returns[ids] - times
    baseline = torch.zeros(horizon).index_add_(0, times, to_go) / torch.bincount(times, minlength=horizon).clamp_min(1)
    return Batch(observations, actions, (to_go - baseline[times]) / horizon, ids, returns)


def minus_return(policy: nn.Module, batch: Batch) -> Tensor:
    """Its gradient is minus the policy gradient."""
    logp = F.log_softmax(policy(batch.observations), -1).gather(1, batch.actions[:, None])[:, 0]
    return -(batch.weights * logp).sum() / len(batch.returns)


@dataclass
class Run:
    name: str
    episodes: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    seconds: float = 0.0


def logits(policy: nn.Module, observations: Tensor) -> Tensor:
    return policy(observations)


def train(name: str, make: Callable[..., Any], updates: int, episodes: int, horizon: int, seed: int) -> Run:
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    generator = torch.Generator().manual_seed(seed)
    opt, run, start = make(policy, generator), Run(name), time.perf_counter()
    draw = lambda n: sample(policy, n, horizon, generator)
    for update in range(updates):
        opt.zero_grad()
        if isinstance(opt, optim.HARPG):
            with opt.interpolate() as change:
                at = draw(episodes // 2)
                _, product = curvature.pg_hvp((policy, logits), None, change, *at[:4])
            batch = draw(episodes - episodes // 2)
            minus_return(policy, batch).backward()
            opt.step(hvp={name: -h for name, h in product.items()})  # of minus the return
        elif isinstance(opt, optim.NPGIGT):
            with opt.extrapolate():
                batch = draw(episodes)
                minus_return(policy, batch).backward()
            opt.step()
        else:
            batch = draw(episodes)
            minus_return(policy, batch).backward()
            opt.step()
        run.episodes.append((update + 1) * episodes)
        run.returns.append(float(batch.returns.mean()))
    run.seconds = time.perf_counter() - start
    return run


RUNS: dict[str, Callable[[nn.Module, torch.Generator], torch.optim.Optimizer]] = {
    "REINFORCE": lambda p, g: torch.optim.SGD(p.parameters(), lr=1.0),
    "N-PG-IGT": lambda p, g: optim.NPGIGT(p.parameters(), lr=1.0),
    "HARPG": lambda p, g: optim.HARPG(p.named_parameters(), lr=0.12, normalize=False, generator=g),
    "N-HARPG": lambda p, g: optim.HARPG(p.named_parameters(), lr=0.3, generator=g),
}


def plot(runs: dict[str, list[Run]], horizon: int, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, seeds in runs.items():
        curves = torch.tensor([r.returns for r in seeds])
        (line,) = ax.plot(seeds[0].episodes, curves.mean(0), label=name)
        ax.fill_between(seeds[0].episodes, curves.amin(0), curves.amax(0), color=line.get_color(), alpha=0.15, lw=0)
    ax.axhline(horizon, color="grey", lw=0.8, ls=":")
    ax.set(xlabel="episodes", ylabel=f"mean return (bands: {len(next(iter(runs.values())))} seeds)")
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--episodes", type=int, default=32, help="of one update")
    parser.add_argument("--horizon", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--png", type=Path, default=Path("build/cartpole.png"))
    options = parser.parse_args()
    if options.quick:
        options.updates, options.episodes, options.horizon, options.seeds = 3, 8, 30, 1
    runs = {
        name: [train(name, make, options.updates, options.episodes, options.horizon, s) for s in range(options.seeds)]
        for name, make in RUNS.items()
    }
    for name, seeds in runs.items():
        tail = [sum(r.returns[-10:]) / len(r.returns[-10:]) for r in seeds]
        print(f"{name:10} mean return of the last 10 updates: {sum(tail) / len(tail):6.1f}  "
              f"(seeds {', '.join(f'{x:.0f}' for x in tail)}), {sum(r.seconds for r in seeds):.1f} s")
    plot(runs, options.horizon, options.png)
    print(f"Curves: {options.png}")


if __name__ == "__main__":
    main()
