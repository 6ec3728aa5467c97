"""rope on heads as models have them, beside the composition in Hugging Face's models."""
from collections.abc import Iterator

import torch
from torch import Tensor

from gradops import curvature

from ..harness import Case, Settings, relative_error

SHAPES = [(1, 8, 512, 64), (4, 32, 1024, 128)]  # batch, heads, tokens, features


def rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def composition(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def cases(settings: Settings) -> Iterator[Case]:
    for shape in SHAPES[:1] if settings.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for variant in ("forward", "gradient"):
                yield case(variant, shape, dtype, settings)


def case(variant: str, shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> Case:
    batch, heads, tokens, d = shape
    generator = torch.Generator().manual_seed(0)
    # What a projection gives, with the heads moved forward.
    x = torch.randn(batch, tokens, heads, d, generator=generator).to(settings.device, dtype).transpose(1, 2)
    g = torch.randn(shape, generator=generator).to(settings.device, dtype)
    angles = torch.outer(torch.arange(tokens), 1e4 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)).repeat(1, 2)
    cos, sin = (t.to(settings.device, dtype) for t in (angles.cos(), angles.sin()))
    point = x.detach().requires_grad_()

    def run(f, x: Tensor = x, point: Tensor = point, g: Tensor = g, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:  # type: ignore[no-untyped-def]
        if variant == "forward":
            return f(x, cos, sin)  # type: ignore[no-any-return]
        return torch.autograd.grad(f(point, cos, sin), point, g)[0]

    def exact() -> Tensor:
        wide = x.detach().double().requires_grad_()
        return run(composition, x.double(), wide, g.double(), cos.double(), sin.double())

    passes = 2 if variant == "forward" else 4
    return Case(
        "rope", "x".join(map(str, shape)), dtype, variant=variant,
        ours=lambda: run(curvature.rope), reference=lambda: run(composition),
        bytes=float(passes * x.numel() * x.element_size()), error=relative_error(exact),
    )  # fmt: skip
