"""Groups of rewards: their advantages, and the moments these rest on."""
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import rl

from ..harness import Case, Settings, relative_error


def cases(settings: Settings) -> Iterator[Case]:
    yield from group_advantages(settings)
    yield from segment_stats(settings)
    yield from group_index(settings)


def torch_grpo(rewards: Tensor, ids: Tensor, groups: int) -> Tensor:
    """As one writes it without a loop: two index_add, in the rewards' dtype; singletons give r."""
    zeros = rewards.new_zeros(groups)
    count = zeros.index_add(0, ids, torch.ones_like(rewards))
    mean = zeros.index_add(0, ids, rewards) / count.clamp(min=1)
    centred = rewards - mean[ids]
    std = (zeros.index_add(0, ids, centred * centred) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std[ids] + 1e-6)


def torch_rows(rewards: Tensor, size: int) -> Tensor:
    r = rewards.view(-1, size)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).view(-1)


def python_loop(rewards: Tensor, ids: list[int]) -> Tensor:
    """Group by group in Python, as trainers that take any groups do."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, g in enumerate(ids):
        groups[g].append(i)
    out = torch.empty_like(rewards)
    for g in groups.values():
        r = rewards[g]
        out[g] = (r - r.mean()) / (r.std() + 1e-6) if len(g) > 1 else 0
    return out


def exact(rewards: Tensor, ids: Tensor, groups: int) -> Tensor:
    return torch_grpo(rewards.double(), ids, groups)


def verl_loop(rewards: Tensor, ids: Tensor) -> dict[str, Callable[[], Any]]:
    try:
        import numpy as np
        from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage as theirs
    except ImportError:
        return {}
    uids = np.array([f"uid-{i}" for i in ids.tolist()], dtype=object)
    mask = torch.ones(len(rewards), 1)
    return {"verl": lambda: theirs(rewards[:, None].clone(), mask, uids)[0][:, 0]}


def _ragged(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, offsets, ids): groups of 1 to 63."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 64, (n // 32,), generator=g)
    n = int(sizes.sum())
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return torch.rand(n, generator=g), offsets, torch.repeat_interleave(torch.arange(len(sizes)), sizes)


def group_advantages(settings: Settings) -> Iterator[Case]:
    device, g = settings.device, torch.Generator().manual_seed(1)
    groups = 256 if settings.quick else 4096
    rewards = torch.rand(groups * 16, generator=g).to(device)
    ids = torch.arange(groups, device=device).repeat_interleave(16)
    shuffled = ids[torch.randperm(len(ids), generator=g).to(device)]
    offsets = torch.arange(0, groups * 16 + 1, 16, device=device)
    shape, n, floor = f"{groups}x16", len(rewards), 8.0 * len(rewards)
    error = relative_error(lambda: exact(rewards, ids, groups))
    yield Case(
        "group_advantages", shape, torch.float32, variant="offsets",
        ours=lambda: rl.group_advantages(rewards, offsets=offsets)[0],
        reference=lambda: torch_grpo(rewards, ids, groups), bytes=floor, error=error,
    )  # fmt: skip
    yield Case(
        "group_advantages", shape, torch.float32, variant="group_size",
        ours=lambda: rl.group_advantages(rewards, group_size=16)[0],
        reference=lambda: torch_rows(rewards, 16), bytes=floor, error=error,
    )  # fmt: skip
    yield Case(
        "group_advantages", shape, torch.float32, variant="ids",
        ours=lambda: rl.group_advantages(rewards, ids=ids)[0],
        reference=lambda: torch_grpo(rewards, ids, groups), bytes=floor, error=error,
    )  # fmt: skip
    yield Case(
        "group_advantages", shape, torch.float32, variant="shuffled ids",
        ours=lambda: rl.group_advantages(rewards, ids=shuffled)[0],
        reference=lambda: torch_grpo(rewards, shuffled, groups), bytes=floor,
        error=relative_error(lambda: exact(rewards, shuffled, groups)),
    )  # fmt: skip
    if device == "cpu":
        labels = ids.tolist()
        yield Case(
            "group_advantages", shape, torch.float32, variant="Python loop",
            ours=lambda: rl.group_advantages(rewards, ids=ids)[0],
            reference=lambda: python_loop(rewards, labels), peers=verl_loop(rewards, ids), bytes=floor, error=error,
        )  # fmt: skip
    # The floor copies rewards to advantages, 8 bytes a reward; labels are another 8.
    n = 100_000 if settings.quick else 1_000_000
    host_rewards, host_offsets, host_ids = _ragged(n)
    order = torch.randperm(len(host_ids), generator=g)
    r, o, i = (t.to(device) for t in (host_rewards, host_offsets, host_ids))
    mixed, count, name = host_ids[order].to(device), len(host_offsets) - 1, f"{n:.0e} ragged".replace("e+0", "e")
    yield Case(
        "group_advantages", name, torch.float32, variant="offsets",
        ours=lambda: rl.group_advantages(r, offsets=o)[0], reference=lambda: torch_grpo(r, i, count),
        bytes=8.0 * len(r), error=relative_error(lambda: exact(r, i, count)),
    )  # fmt: skip
    yield Case(
        "group_advantages", name, torch.float32, variant="shuffled ids",
        ours=lambda: rl.group_advantages(r, ids=mixed)[0], reference=lambda: torch_grpo(r, mixed, count),
        bytes=8.0 * len(r), error=relative_error(lambda: exact(r, mixed, count)),
    )  # fmt: skip
    sparse = (mixed - 7) * 1_000_003
    yield Case(
        "group_advantages", name, torch.float32, variant="sparse ids",
        ours=lambda: rl.group_advantages(r, ids=sparse)[0],
        reference=lambda: torch_grpo(r, torch.unique(sparse, return_inverse=True)[1], count),
        bytes=8.0 * len(r), error=relative_error(lambda: exact(r, mixed, count)),
    )  # fmt: skip


def torch_stats(x: Tensor, ids: Tensor, groups: int) -> tuple[Tensor, ...]:
    zeros = x.new_zeros(groups)
    count = zeros.index_add(0, ids, torch.ones_like(x))
    mean = zeros.index_add(0, ids, x) / count
    m2 = zeros.index_add(0, ids, (x - mean[ids]) ** 2)
    low = x.new_full((groups,), torch.inf).scatter_reduce(0, ids, x, "amin")
    high = x.new_full((groups,), -torch.inf).scatter_reduce(0, ids, x, "amax")
    return count, mean, m2, low, high


def segment_stats(settings: Settings) -> Iterator[Case]:
    n = 100_000 if settings.quick else 1_000_000
    x, offsets, ids = (t.to(settings.device) for t in _ragged(n))
    groups = len(offsets) - 1
    m2 = relative_error(lambda: torch_stats(x.double(), ids, groups)[2])
    yield Case(
        "segment_stats", f"{n:.0e} ragged".replace("e+0", "e"), torch.float32, variant="offsets",
        ours=lambda: rl.segment_stats(x, offsets=offsets), reference=lambda: torch_stats(x, ids, groups),
        bytes=4.0 * len(x), error=lambda s: m2(s[2]),
    )  # fmt: skip


def group_index(settings: Settings) -> Iterator[Case]:
    n = 100_000 if settings.quick else 1_000_000
    labels = torch.randint(0, n // 32, (n,), generator=torch.Generator().manual_seed(0)).to(settings.device) * 10**12
    yield Case(
        "group_index", f"{n:.0e}".replace("e+0", "e"), torch.int64, variant="sparse labels",
        ours=lambda: rl.group_index(labels),
        reference=lambda: torch.unique(labels, return_inverse=True, return_counts=True), bytes=24.0 * n,
    )  # fmt: skip
