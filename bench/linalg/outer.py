"""Gram matrices of per-sample gradients of linear layers, against forming the gradients."""
from collections.abc import Iterator

import torch
from torch import Tensor

from gradops import linalg

from ..harness import Case, Settings, relative_error

# Samples, tokens (0: none), inputs, outputs. The second and the third go by token pairs, the last two by sample blocks.
SHAPES = [(128, 0, 3072, 300), (64, 8, 512, 512), (128, 16, 256, 512), (32, 256, 256, 256), (8, 1024, 512, 512)]


def cases(settings: Settings) -> Iterator[Case]:
    for samples, tokens, d, p in SHAPES[:1] if settings.quick else SHAPES:
        shape = (samples, tokens) if tokens else (samples,)
        generator = torch.Generator().manual_seed(0)
        x, g = (torch.randn(*shape, n, generator=generator).to(settings.device) for n in (d, p))
        t = max(1, tokens)
        pairs = (samples * t) ** 2 * (d + p)
        blocks = 2 * samples * t * d * p + samples**2 * d * p
        yield Case(
            "gram_outer", f"{'x'.join(map(str, shape))}, {d} to {p}", torch.float32,
            ours=lambda x=x, g=g: linalg.gram_outer(x, g), reference=lambda x=x, g=g: torch_gram(x, g),
            flops={torch.float64: float(min(pairs, blocks))}, bytes=4.0 * (x.numel() + g.numel()), reads=True,
            error=relative_error(lambda x=x, g=g: torch_gram(x.double(), g.double())),
        )  # fmt: skip


def torch_gram(x: Tensor, g: Tensor) -> Tensor:
    """As one writes it: every gradient, then the products of all pairs, in float64 by parts."""
    x, g = (t if t.dim() == 3 else t[:, None] for t in (x, g))
    weight, bias = (g.mT @ x).flatten(1), g.sum(1)
    parts = (part.double() for J in (weight, bias) for part in J.split(2**14, 1))
    return sum((c @ c.mT for c in parts), x.new_zeros(len(x), len(x), dtype=torch.float64))
