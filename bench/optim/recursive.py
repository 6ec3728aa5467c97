"""HARPG and N-PG-IGT: one step, beside the recursion in torch's multi-tensor operations."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradops import optim

from ..harness import Case, Settings

SIZES = {"1M in 30": [(256, 128)] * 28 + [(512,)] * 2, "20M in 150": [(512, 512)] * 75 + [(512,)] * 75}
ETA, LR = 0.1, 1e-6  # nothing moves far while it is timed


def cases(settings: Settings) -> Iterator[Case]:
    for name in ["1M in 30"] if settings.quick else SIZES:
        for method in ("HARPG", "NPGIGT"):
            yield case(method, name, settings)


def parameters(name: str, settings: Settings) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(settings.device)) for s in SIZES[name]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(settings.device)
    return params


def case(method: str, name: str, settings: Settings) -> Case:
    mine, theirs = (parameters(name, settings) for _ in range(2))
    products = [torch.randn_like(p) for p in mine]
    d = [torch.randn_like(p) for p in theirs]
    grads: list[Any] = [p.grad for p in theirs]
    opt: Any = getattr(optim, method)(mine, lr=LR, eta=ETA, decay=False)
    ours: Callable[[], object] = opt.step
    if method == "HARPG":
        opt.step(hvp=products)

        def ours() -> object:
            return opt.step(hvp=products)

    @torch.no_grad()
    def foreach() -> Tensor:
        if method == "HARPG":
            torch._foreach_add_(d, products)
        torch._foreach_lerp_(d, grads, ETA)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(d)))
        torch._foreach_sub_(theirs, torch._foreach_mul(d, LR / norm))  # type: ignore[arg-type]
        return norm

    numbers = sum(p.numel() for p in mine)
    return Case(
        f"{method}.step", name, torch.float32, ours=ours, reference=foreach,
        bytes=4.0 * numbers * (7 if method == "HARPG" else 6),
    )  # fmt: skip
