"""swiglu: y, its gradients, and their change, beside torch's composition."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradops import curvature

from ..harness import Case, Settings, relative_error

SHAPES = [(512, 5632), (4096, 5632)]  # tokens, width of a small Llama's feed-forward layer
Gated = Callable[[Tensor, Tensor], Tensor]


def composition(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def cases(settings: Settings) -> Iterator[Case]:
    for shape in SHAPES[:1] if settings.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for variant in ("forward", "gradient", "double backward", "jvp of gradient"):
                yield case(variant, shape, dtype, settings)


def case(variant: str, shape: tuple[int, int], dtype: torch.dtype, settings: Settings) -> Case:
    generator = torch.Generator().manual_seed(0)
    gate, up, g, *v = (torch.randn(shape, generator=generator).to(settings.device, dtype) for _ in range(5))
    points = [t.detach().requires_grad_() for t in (gate, up)]

    def run(f: Gated, points: list[Tensor] = points, g: Tensor = g, v: list[Tensor] = v) -> Tensor:
        if variant == "forward":
            return f(points[0].detach(), points[1].detach())
        if variant == "jvp of gradient":
            at = tuple(p.detach() for p in points)
            changes: Any = torch.func.jvp(lambda *x: torch.func.vjp(f, *x)[1](g), at, tuple(v))[1]
            return changes[0]
        grads = torch.autograd.grad(f(*points), points, g, create_graph=variant == "double backward")
        if variant == "double backward":
            grads = torch.autograd.grad(grads, points, v)
        return grads[0]


    def exact() -> Tensor:
        wide = [p.detach().double().requires_grad_() for p in points]
        return run(composition, wide, g.double(), [t.double() for t in v])

    passes = {"forward": 3, "gradient": 8, "double backward": 15, "jvp of gradient": 15}[variant]
    return Case(
        "swiglu", f"{shape[0]}x{shape[1]}", dtype, variant=variant,
        ours=lambda: run(curvature.swiglu), reference=lambda: run(composition),
        # Each pass reads its inputs and writes its results once.
        bytes=float(passes * gate.numel() * gate.element_size()),
        error=relative_error(exact),
    )  # fmt: skip
