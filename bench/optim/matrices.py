"""Optimizers of matrices: one step over sets of parameters, against torch's own optimizers or the plain loop."""
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gradops import optim

from ..harness import Case, Settings
from ..linalg.polar import torch_polar

# A decoder of width 256 with 4 layers: query, key, value and output, then the two of its MLP.
TRANSFORMER = [(256, 256)] * 16 + [(1024, 256)] * 4 + [(256, 1024)] * 4
SETS: dict[str, list[tuple[int, int]]] = {
    "64 of 64x64": [(64, 64)] * 64,
    "32 of 128x128": [(128, 128)] * 32,
    "16 of 256x256": [(256, 256)] * 16,
    "transformer": TRANSFORMER,
}


def cases(settings: Settings) -> Iterator[Case]:
    yield from muon(settings)
    yield from polar_grad(settings)


def parameters(shapes: list[tuple[int, int]], dtype: torch.dtype, settings: Settings) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)

    def gaussian(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=generator).to(settings.device, dtype)

    out = [nn.Parameter(gaussian(shape)) for shape in shapes]
    for p, shape in zip(out, shapes, strict=True):
        p.grad = gaussian(shape)
    return out


def _bytes(params: list[nn.Parameter]) -> float:
    """Parameter and momentum are read and written, the gradient is read."""
    return float(sum(5 * p.numel() * p.element_size() for p in params))


def _work(shapes: list[tuple[int, int]]) -> float:
    """Five Newton-Schulz steps, symmetric products by halves."""
    return float(sum(5 * (3 * min(s) ** 2 * max(s) + min(s) ** 3) for s in shapes))


def muon(settings: Settings) -> Iterator[Case]:
    # torch's iteration is in bfloat16 whatever the parameters are: "medium" is that choice, None float32's own.
    kinds = [(torch.float32, None), (torch.float32, "medium"), (torch.bfloat16, None)]
    for name in ["64 of 64x64"] if settings.quick else SETS:
        for dtype, precision in kinds:
            shapes = SETS[name]
            # Two copies, so that one does not find the other's numbers in the cache.
            ours, theirs = (parameters(shapes, dtype, settings) for _ in range(2))
            product = torch.bfloat16 if precision == "medium" else dtype
            yield Case(
                "Muon.step", name, dtype, variant=precision or "",
                ours=optim.Muon(ours, lr=1e-3, precision=precision).step,
                reference=torch.optim.Muon(theirs, lr=1e-3).step,
                flops={product: _work(shapes)}, bytes=_bytes(ours),
            )  # fmt: skip


class PlainPolarGrad:
    """Momentum-first PolarGrad as a loop in plain torch, with the SVD for the polar factor."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        self.params, self.lr, self.momentum = params, lr, momentum
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, m in zip(self.params, self.buffers, strict=True):
            m.lerp_(p.grad, 1 - self.momentum)
            u, h = torch_polar(m)
            p.sub_(self.lr * h.diagonal(dim1=-2, dim2=-1).sum() * u)


def polar_grad(settings: Settings) -> Iterator[Case]:
    for name in ["64 of 64x64"] if settings.quick else SETS:
        shapes = SETS[name]
        ours, theirs = (parameters(shapes, torch.float32, settings) for _ in range(2))
        yield Case(
            "PolarGrad.step", name, torch.float32,
            ours=optim.PolarGrad(ours, lr=1e-4).step, reference=PlainPolarGrad(theirs, lr=1e-4).step,
            flops={torch.float32: _work(shapes)}, bytes=_bytes(ours),
        )  # fmt: skip
