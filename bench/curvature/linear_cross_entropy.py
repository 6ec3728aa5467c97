"""Cross entropy of an output layer: the loss with its gradients, their change, and the Gauss-Newton matrix."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp

from gradops import curvature

from ..harness import Case, Settings, relative_error

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden, weight and target
Pair = tuple[Tensor, Tensor]


def materialized(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    hidden_dot: Tensor
    weight_dot: Tensor

    @property
    def leaves(self) -> Pair:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    @property
    def shape(self) -> str:
        return "x".join(map(str, (*self.hidden.shape, len(self.weight))))

    @property
    def product(self) -> float:  # floating-point operations of one
        return 2.0 * self.hidden.numel() * len(self.weight)

    def double(self) -> Problem:
        return Problem(*(t.double() if t.is_floating_point() else t for t in vars(self).values()))

    def gradients(self, loss: Loss) -> Pair:
        x = self.leaves
        return torch.autograd.grad(loss(*x, self.target), x)  # type: ignore[return-value]

    def double_backward(self, loss: Loss) -> Pair:
        x = self.leaves
        gradients = torch.autograd.grad(loss(*x, self.target), x, create_graph=True)
        return torch.autograd.grad(gradients, x, (self.hidden_dot, self.weight_dot))  # type: ignore[return-value]

    def forward_over_reverse(self, loss: Loss) -> Pair:
        gradients = grad(lambda h, w: loss(h, w, self.target), (0, 1))
        return jvp(gradients, (self.hidden, self.weight), (self.hidden_dot, self.weight_dot))[1]

    def gauss_newton(self) -> Pair:
        z = F.linear(self.hidden, self.weight)
        u = F.linear(self.hidden_dot, self.weight) + F.linear(self.hidden, self.weight_dot)
        p = z.softmax(-1)
        r = (p * u - p * (p * u).sum(-1, keepdim=True)) / len(z)
        return r @ self.weight, r.mT @ self.hidden


def problem(rows: int, inner: int, classes: int, dtype: torch.dtype, device: str) -> Problem:
    g = torch.Generator().manual_seed(0)

    def numbers(n: int, scale: float) -> Tensor:
        return (scale * torch.randn(n, inner, generator=g)).to(device, dtype)

    width = inner**-0.5
    target = torch.randint(classes, (rows,), generator=g).to(device)
    return Problem(numbers(rows, 1), numbers(classes, 2 * width), target, numbers(rows, 1), numbers(classes, width))


def error(exact: Callable[[], Pair]) -> Callable[[Pair], float]:
    each = [relative_error(lambda i=i: exact()[i]) for i in (0, 1)]  # type: ignore[misc]
    return lambda pair: max(f(t) for f, t in zip(each, pair, strict=True))


def all_of(p: Problem, affordable: bool) -> Iterator[Case]:
    ours = curvature.linear_cross_entropy
    dtype: Any = p.hidden.dtype
    peers: dict[str, Callable[[], Any]] = {}
    # In bfloat16 one call of it takes minutes on a CPU.
    if hasattr(F, "linear_cross_entropy") and (dtype == torch.float32 or p.hidden.is_cuda):
        peers["F.linear_cross_entropy"] = lambda: p.gradients(chunked)

    def unreduced(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ours(hidden, weight, target, reduction="none").mean()

    peers['ours, "none"'] = lambda: p.gradients(unreduced)
    exact: Callable[[Callable[[Problem], Pair]], Any] = lambda f: error(lambda: f(p.double())) if affordable else None
    yield Case(
        "linear_cross_entropy, with gradients", p.shape, dtype, ours=lambda: p.gradients(ours),
        reference=lambda: p.gradients(materialized), peers=peers, flops={dtype: 3 * p.product},
        error=exact(lambda q: q.gradients(materialized)),
    )  # fmt: skip
    yield Case(
        "linear_cross_entropy, double backward", p.shape, dtype, ours=lambda: p.double_backward(ours),
        reference=lambda: p.double_backward(materialized),
        peers={"ours, jvp(grad)": lambda: p.forward_over_reverse(ours),
               "torch, jvp(grad)": lambda: p.forward_over_reverse(materialized)},
        flops={dtype: 9 * p.product}, error=exact(lambda q: q.double_backward(materialized)),
    )  # fmt: skip
    yield Case(
        "linear_ce_ggnvp", p.shape, dtype,
        ours=lambda: curvature.linear_ce_ggnvp(p.hidden, p.weight, p.hidden_dot, p.weight_dot, p.target),
        reference=p.gauss_newton, flops={dtype: 5 * p.product}, error=exact(lambda q: q.gauss_newton()),
    )  # fmt: skip


def cases(settings: Settings) -> Iterator[Case]:
    shapes = [(512, 256, 50304), (512, 768, 50304)] if settings.device == "cpu" else [(8192, 4096, 131072)]
    if settings.quick:
        shapes = [(256, 64, 8192)]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, inner, classes in shapes[:1] if dtype == torch.bfloat16 else shapes:
            # In float64, with all logits, the larger one takes longest of all
            yield from all_of(problem(rows, inner, classes, dtype, settings.device), inner <= 256)
