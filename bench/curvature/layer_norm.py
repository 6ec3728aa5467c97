"""Layer and RMS norm: the operation, its gradient and both second-order compositions, against torch's own."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn import functional as F

from gradops import curvature
from gradops.curvature import reference

from ..harness import Case, Settings, relative_error

Function = Callable[..., Tensor]
OPS: dict[str, tuple[Function, Function, Function, int]] = {  # ours, torch's, what is right, how many inputs
    "layer_norm": (
        curvature.layer_norm,
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        reference.layer_norm,
        3,
    ),
    "rms_norm": (
        curvature.rms_norm,
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
        reference.rms_norm,
        2,
    ),
}  # fmt: skip


def forward(f: Function, x: list[Tensor], v: list[Tensor], g: Tensor) -> Callable[[], Any]:
    return lambda: [f(*x)]


def backward(f: Function, x: list[Tensor], v: list[Tensor], g: Tensor) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in x]
    y = f(*leaves)
    return lambda: torch.autograd.grad(y, leaves, g, retain_graph=True)


def change(f: Function, x: list[Tensor], v: list[Tensor], g: Tensor) -> Callable[[], Any]:
    return lambda: [jvp(f, tuple(x), tuple(v))[1]]


def double_backward(f: Function, x: list[Tensor], v: list[Tensor], g: Tensor) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in x]
    seed = g.detach().requires_grad_()
    grads = torch.autograd.grad(f(*leaves), leaves, seed, create_graph=True)
    return lambda: torch.autograd.grad(grads, [*leaves[:2], seed], v, retain_graph=True)


def forward_over_reverse(f: Function, x: list[Tensor], v: list[Tensor], g: Tensor) -> Callable[[], Any]:
    return lambda: jvp(lambda *x: vjp(f, *x)[1](g), tuple(x), tuple(v))[1]


# What a composition must read and write at least, in tensors like x.
KINDS = {
    "forward": (forward, 2),
    "backward": (backward, 3),
    "jvp": (change, 4),
    "double backward": (double_backward, 5),
    "jvp of the gradient": (forward_over_reverse, 5),
}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def case(name: str, kind: str, rows: int, n: int, dtype: torch.dtype, settings: Settings) -> Case:
    torch.manual_seed(0)
    ours, theirs, right, inputs = OPS[name]
    make, tensors = KINDS[kind]
    random = lambda *shape: torch.randn(shape, device=settings.device).to(dtype)
    x, v = ([random(rows, n), *(random(n) for _ in range(inputs - 1))] for _ in range(2))
    g = random(rows, n)
    exact = make(right, [t.double() for t in x], [t.double() for t in v], g.double())
    distance = relative_error(lambda: flat(exact()))
    return Case(
        f"{name}, {kind}", f"{rows}x{n}", dtype, ours=make(ours, x, v, g), reference=make(theirs, x, v, g),
        bytes=tensors * rows * n * dtype.itemsize, error=lambda y: distance(flat(y)),
    )  # fmt: skip


def cases(settings: Settings) -> Iterator[Case]:
    shapes = [(512, 256, torch.float32)] if settings.quick else [
        (4096, 1024, torch.float32), (4096, 1024, torch.bfloat16), (256, 8192, torch.float32)]
    for name in OPS:
        for kind in KINDS:
            for rows, n, dtype in shapes if kind in ("forward", "backward") else shapes[:2]:
                yield case(name, kind, rows, n, dtype, settings)
