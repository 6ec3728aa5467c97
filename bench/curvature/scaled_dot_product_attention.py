"""Attention and its derivatives of two orders, against torch: its flash kernels, which have one, and MATH, which has
both. The floors are the products of tiles that a method needs, half of the full ones where it is causal."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradops.curvature import scaled_dot_product_attention

from ..harness import Case, Settings

Call = Callable[..., Any]


def plain(*x: Tensor, **given: Any) -> Tensor:
    return F.scaled_dot_product_attention(*x, **given)


def math(*x: Tensor, **given: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*x, **given)


@dataclass
class Problem:
    time: int
    d: int = 64
    key_heads: int = 8
    mask: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        heads = (8, self.key_heads, self.key_heads)
        random = lambda: [torch.randn(1, h, self.time, self.d, device=self.device).to(self.dtype) for h in heads]
        self.x, self.v = random(), random()
        self.given: dict[str, Any] = {"is_causal": True}
        if self.key_heads != 8:
            self.given["enable_gqa"] = True
        if self.mask:  # two documents
            document = (torch.arange(self.time, device=self.device) > self.time // 3)[:, None]
            self.given = {"attn_mask": (document == document.mT).tril()}

    @property
    def shape(self) -> str:
        groups = "" if self.key_heads == 8 else f"/{self.key_heads}"
        return f"H=8{groups} T={self.time} d={self.d} {'documents' if self.mask else 'causal'}"

    def floor(self, products: int) -> dict[torch.dtype, float]:
        return {self.dtype: products * 8.0 * self.time**2 * self.d}

    def loss(self, f: Call) -> Call:
        def half_square(*x: Tensor) -> Tensor:
            y = f(*x, **self.given)
            return 0.5 * y.to(torch.promote_types(y.dtype, torch.float32)).square().sum()

        return half_square

    def points(self) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in self.x]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def forward(p: Problem, f: Call) -> Tensor:
    with torch.no_grad():
        return f(*p.x, **p.given).flatten()


def gradient(p: Problem, f: Call) -> Tensor:
    x = p.points()
    return flat(torch.autograd.grad(p.loss(f)(*x), x))


def jvp_grad(p: Problem, f: Call) -> Tensor:
    return flat(jvp(grad(p.loss(f), (0, 1, 2)), tuple(p.x), tuple(p.v))[1])


def double_backward(p: Problem, f: Call) -> Tensor:
    x = p.points()
    grads = torch.autograd.grad(p.loss(f)(*x), x, create_graph=True)
    return flat(torch.autograd.grad(grads, x, p.v))


def dual(p: Problem, f: Call) -> Tensor:
    """A backward pass without a graph in raw forward mode: both passes fused with their changes."""
    x = p.points()
    with forward_ad.dual_level():
        grads = torch.autograd.grad(p.loss(f)(*map(forward_ad.make_dual, x, p.v)), x)
        return flat(forward_ad.unpack_dual(g).tangent for g in grads)


def error_of(p: Problem, run: Call) -> Callable[[Any], float]:
    """From float64, where MATH gives products with the Hessian by double backward: the lightest of its ways."""
    known: list[Tensor] = []

    def error(y: Any) -> float:
        if y is None:
            return float("nan")
        if not known:
            x, v = p.x, p.v
            p.x, p.v = [t.double() for t in x], [t.double() for t in v]
            known.append((run if run in (forward, gradient) else double_backward)(p, math))
            p.x, p.v = x, v
        return float((y.double() - known[0]).norm() / known[0].norm())

    return error


def first_order(p: Problem, name: str, run: Call, products: int) -> Case:
    return Case("scaled_dot_product_attention", p.shape, p.dtype, variant=name,
                ours=lambda: run(p, scaled_dot_product_attention), reference=lambda: run(p, plain),
                flops=p.floor(products), error=error_of(p, run))


def second_order(p: Problem, name: str, run: Call) -> Case:
    slow = double_backward if run is dual else run  # MATH has no backward pass in raw forward mode without a graph

    def flash_gradient() -> None:  # there for its time
        gradient(p, plain)

    return Case("scaled_dot_product_attention", p.shape, p.dtype, variant=name,
                ours=lambda: run(p, scaled_dot_product_attention), reference=lambda: slow(p, math),
                peers={"flash gradient": flash_gradient},
                flops=p.floor(21), error=error_of(p, run))


def cases(settings: Settings) -> Iterator[Case]:
    for time in (256,) if settings.quick else (512, 1024, 2048):
        p = Problem(time, device=settings.device)
        yield first_order(p, "forward", forward, 2)
        yield first_order(p, "gradient", gradient, 7)
        yield second_order(p, "jvp(grad)", jvp_grad)
        yield second_order(p, "double backward", double_backward)
        yield second_order(p, "dual", dual)
    if settings.quick:
        return
    for more in ({"d": 32}, {"d": 128}, {"d": 256}, {"key_heads": 2}, {"mask": True}, {"dtype": torch.bfloat16}):
        p = Problem(1024, device=settings.device, **more)
        yield first_order(p, "gradient", gradient, 7)
        yield second_order(p, "jvp(grad)", jvp_grad)
