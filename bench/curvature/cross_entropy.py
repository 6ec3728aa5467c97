"""Cross entropy: the loss with its gradient, and the product of its Hessian with a vector."""
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gradops import curvature

from ..harness import Case, Settings, relative_error

SHAPES = ((512, 50304), (256, 151936), (4096, 1024))


def numbers(rows: int, classes: int, dtype: torch.dtype, device: str, seed: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    return x.mul_(scale).to(device, dtype)


def closed_form(z: Tensor, u: Tensor) -> Tensor:
    p = z.softmax(-1)
    return (p * u - p * (p * u).sum(-1, keepdim=True)) / len(z)


def exact(z: Tensor, u: Tensor) -> Callable[[], Tensor]:
    """In float64, a few rows at a time."""
    return lambda: torch.cat([closed_form(a.double(), b.double()) * len(a) / len(z)
                              for a, b in zip(z.split(64), u.split(64), strict=True)])


def double_backward(z: Tensor, u: Tensor, y: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    gradient, = torch.autograd.grad(F.cross_entropy(z, y), z, create_graph=True)
    return torch.autograd.grad(gradient, z, u)[0]


def product(rows: int, classes: int, dtype: torch.dtype, settings: Settings) -> Case:
    z, u = (numbers(rows, classes, dtype, settings.device, seed, scale) for seed, scale in ((0, 3.0), (1, 1.0)))
    y = torch.zeros(rows, dtype=torch.int64, device=settings.device)
    compiled = torch.compile(closed_form, dynamic=False)
    peers = {
        "torch.compile of the closed form": lambda: compiled(z, u),
        "closed form": lambda: closed_form(z, u),
        "z.clone() and u.sum()": lambda: (z.clone(), u.view(torch.int64).sum())[0],
    }
    out = torch.empty_like(z)
    peers["ours, out="] = lambda: curvature.softmax_ce_hvp(z, u, out=out)
    return Case(
        "softmax_ce_hvp", f"{rows}x{classes}", dtype, ours=lambda: curvature.softmax_ce_hvp(z, u),
        reference=lambda: double_backward(z, u, y), peers=peers, bytes=3.0 * z.nbytes,
        error=relative_error(exact(z, u)),
    )  # fmt: skip


def loss_and_gradient(rows: int, classes: int, dtype: torch.dtype, settings: Settings) -> Case:
    z = numbers(rows, classes, dtype, settings.device, 0, 3.0).requires_grad_()
    y = (torch.arange(rows, device=settings.device) * 7) % classes

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(z, y), z)[0]

    def wanted() -> Tensor:
        w = z.detach().double().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(w, y), w)[0]

    return Case(
        "cross_entropy, with gradient", f"{rows}x{classes}", dtype, ours=lambda: gradient(curvature.cross_entropy),
        reference=lambda: gradient(F.cross_entropy), bytes=3.0 * z.nbytes, error=relative_error(wanted),
    )  # fmt: skip


def cases(settings: Settings) -> Iterator[Case]:
    for shape in SHAPES:
        for make in (product, loss_and_gradient):
            yield make(*shape, torch.float32, settings)
    for make in (product, loss_and_gradient):
        yield make(*SHAPES[0], torch.bfloat16, settings)
