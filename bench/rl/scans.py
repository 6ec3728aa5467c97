"""Cases of the scans: returns, advantages and V-trace along rows, and the plans of part 7.

Bytes are those of the tokens' own numbers: what is read and what is written, once, results included.
"""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import rl
from gradops.rl import reference

from ..harness import Case, Settings

GAMMA, LAM = 0.99, 0.95


def cases(settings: Settings) -> Iterator[Case]:
    yield from gae(settings)
    yield from packed_gae(settings)
    yield from returns(settings)
    yield from vtrace(settings)
    if settings.device == "cpu":
        yield from allocate(settings)


def numbers(n: int, shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(settings.device, dtype) for _ in range(n)]


def torch_gae(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over tokens as one writes it, vectorised over rows."""
    following = carry = torch.zeros_like(rewards[:, 0])
    advantages = torch.empty_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        carry = advantages[:, t] = delta + GAMMA * LAM * carry
        following = values[:, t]
    return advantages, advantages + values


def peer(f: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """f(), a dict of contenders, if their packages are installed."""
    try:
        return f()
    except ImportError:
        return {}


def torchrl_gae(rewards: Tensor, values: Tensor) -> dict[str, Callable[[], Any]]:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    done = torch.zeros_like(rewards, dtype=torch.bool)
    done[:, -1] = True
    v, n, r, d = (x[..., None] for x in (values, following, rewards, done))
    return {"torchrl": lambda: [x[..., 0] for x in vec_generalized_advantage_estimate(GAMMA, LAM, v, n, r, d, d)]}


def verl_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> dict[str, Callable[[], Any]]:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    number = mask.to(rewards.dtype)  # whitens as well, a few passes beside thousands
    return {"verl": lambda: compute_gae_advantage_return(rewards, values, number, GAMMA, LAM)}


def error(exact: Callable[[], Tensor]) -> Callable[[Any], float]:
    """The largest error, relative to the largest number, of the first result."""
    known: list[Tensor] = []

    def measure(out: Any) -> float:
        if not known:
            known.append(exact())
        first = out if isinstance(out, Tensor) else out[0]
        return float((first.double() - known[0]).abs().max() / known[0].abs().max())

    return measure


def gae(settings: Settings) -> Iterator[Case]:
    shapes = [(1024, 4096)] if settings.quick else [(1024, 4096), (8192, 32), (64, 1024), (1, 131072)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            rewards, values = numbers(2, shape, dtype, settings)
            tokens = rewards.numel()
            loop = dtype == torch.float32
            yield Case(
                "gae", f"{shape[0]}x{shape[1]}", dtype,
                ours=lambda r=rewards, v=values: rl.gae(r, v, gamma=GAMMA, lam=LAM),
                reference=(lambda r=rewards, v=values: torch_gae(r, v)) if loop else None,
                peers=peer(lambda r=rewards, v=values: torchrl_gae(r, v)) if loop else {},
                bytes=tokens * (2.0 * rewards.element_size() + 8),
                error=error(lambda r=rewards, v=values: reference.gae(r.double(), v.double(), gamma=GAMMA, lam=LAM)[0]),
            )  # fmt: skip
    rewards, values = numbers(2, (1024, 4096), torch.float32, settings)
    # turns of 1 to 400 tokens, every second one by the model
    turns = torch.randint(1, 400, (rewards.numel() // 100,), generator=torch.Generator().manual_seed(1))
    turn = torch.repeat_interleave(turns)[: rewards.numel()].view(rewards.shape)
    mask = (turn % 2 == 0).to(settings.device)
    yield Case(
        "gae", "1024x4096", torch.float32, variant="masked",
        ours=lambda: rl.gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask),
        peers=peer(lambda: verl_gae(rewards, values, mask)), bytes=rewards.numel() * 17.0,
    )  # fmt: skip


def packed_gae(settings: Settings) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(64, 2048, (1024,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(settings.device)
    rewards, values = numbers(2, (int(lengths.sum()),), torch.float32, settings)
    row = torch.repeat_interleave(torch.arange(1024), lengths).to(settings.device)
    place = torch.arange(len(rewards), device=settings.device) - cu_seqlens[row]
    padded = [torch.zeros(1024, 2047, device=settings.device).index_put((row, place), x) for x in (rewards, values)]

    def pad_and_loop() -> list[Tensor]:  # padding is zeros, so the carry of a row starts at its end
        return [x[row, place] for x in torch_gae(*padded)]

    yield Case(
        "gae", f"1024 rows, {len(rewards)} tokens", torch.float32, variant="packed",
        ours=lambda: rl.gae(rewards, values, gamma=GAMMA, lam=LAM, cu_seqlens=cu_seqlens),
        reference=pad_and_loop, bytes=len(rewards) * 16.0,
        error=error(lambda: reference.gae(*(x.double() for x in padded), gamma=GAMMA, lam=LAM)[0][row, place]),
    )  # fmt: skip


def returns(settings: Settings) -> Iterator[Case]:
    rewards, = numbers(1, (1024, 4096), torch.float32, settings)

    def loop() -> Tensor:
        out = torch.empty_like(rewards)
        carry = torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            carry = out[:, t] = rewards[:, t] + GAMMA * carry
        return out

    yield Case(
        "discounted_returns", "1024x4096", torch.float32, ours=lambda: rl.discounted_returns(rewards, GAMMA),
        reference=loop, bytes=rewards.numel() * 8.0,
        error=error(lambda: reference.discounted_returns(rewards.double(), GAMMA)),
    )  # fmt: skip


def vtrace(settings: Settings) -> Iterator[Case]:
    rewards, values, log_ratios = numbers(3, (1024, 4096), torch.float32, settings)

    def torchrl() -> dict[str, Callable[[], Any]]:
        from torchrl.objectives.value.functional import vtrace_advantage_estimate

        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        done = torch.zeros_like(rewards, dtype=torch.bool)
        done[:, -1] = True
        p, v, n, r, d = (x[..., None] for x in (log_ratios, values, following, rewards, done))
        zero = torch.zeros_like(p)
        return {"torchrl": lambda: [x[..., 0] for x in vtrace_advantage_estimate(GAMMA, p, zero, v, n, r, d, d)]}

    yield Case(
        "vtrace", "1024x4096", torch.float32, ours=lambda: rl.vtrace(rewards, values, log_ratios, gamma=GAMMA),
        peers=peer(torchrl), bytes=rewards.numel() * 20.0,
        error=error(lambda: reference.vtrace(*(x.double() for x in (rewards, values, log_ratios)), gamma=GAMMA)[0]),
    )  # fmt: skip


def allocate(settings: Settings) -> Iterator[Case]:
    p = torch.rand(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in ("exact", "greedy"):
        yield Case("allocate_rollouts", "512 prompts, 8192", torch.float64, variant=method,
                   ours=lambda m=method: rl.allocate_rollouts(p, 8192, method=m))
