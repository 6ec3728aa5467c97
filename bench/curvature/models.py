"""Whole models: products with the Hessian and the Gauss-Newton matrix, against torch, curvlinops and the gradient.

The floors are floating-point operations of the matrix products: a gradient is 3 forward passes, a product with the
Hessian 8, each further one 6, one with the Gauss-Newton matrix 5.
"""
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradops import curvature

from ..harness import Case, Settings, relative_error

WIDTH, LAYERS, HEADS, TIME, VOCABULARY = 256, 4, 4, 256, 2048


class Block(nn.Module):
    # The only one of torch with second derivatives; a gradient, and second_order_kernels, need none.
    attention: Callable[[], AbstractContextManager[Any]] = staticmethod(lambda: sdpa_kernel(SDPBackend.MATH))

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 704, bias=False) for _ in range(2))
        self.down = nn.Linear(704, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        with self.attention():
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TIME, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions.weight))).flatten(0, 1)


@dataclass
class Problem:
    shape: str
    model: nn.Module
    x: Tensor
    y: Tensor
    forward: float  # floating-point operations
    kernels: bool = False  # under second_order_kernels

    def __post_init__(self) -> None:
        self.params = {name: p.detach() for name, p in self.model.named_parameters()}
        self.v = {name: torch.randn_like(p) for name, p in self.params.items()}
        self.exact: Tensor | None = None

    def outputs(self, params: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, params, (self.x,))

    def within(self, f: Callable[[], Any]) -> Callable[[], Any]:
        """f in the context that this problem is about."""
        def run() -> Any:
            with curvature.second_order_kernels() if self.kernels else nullcontext():
                return f()

        return run

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.outputs(params), self.y)


def perceptron(width: int, samples: int, device: str) -> Problem:
    layers = [layer for _ in range(5) for layer in (nn.Linear(width, width), nn.GELU())]
    model = nn.Sequential(*layers[:-1]).to(device)
    x, y = torch.randn(samples, width, device=device), torch.randint(width, (samples,), device=device)
    return Problem(f"MLP 5x{width}, B={samples}", model, x, y, 10.0 * samples * width * width)


def gpt(batch: int, device: str) -> Problem:
    model = GPT().to(device)
    ids = torch.randint(VOCABULARY, (batch, TIME), device=device)
    weights = sum(p.numel() for p in model.parameters()) - (VOCABULARY + TIME) * WIDTH
    attention = LAYERS * 4 * TIME * WIDTH
    return Problem(f"GPT 4x256, T=256, B={batch}", model, ids, ids.flatten().roll(-1),
                   batch * TIME * (2.0 * weights + attention))


def cases(settings: Settings) -> Iterator[Case]:
    for make in (lambda: perceptron(256 if settings.quick else 1024, 256 if settings.quick else 1024, settings.device),
                 lambda: gpt(1 if settings.quick else 4, settings.device)):
        torch.manual_seed(0)
        problem = make()
        for kernels in (False, True):
            p = replace(problem, kernels=kernels, shape=problem.shape + ", second_order_kernels" * kernels)
            yield hessian(p)
            yield one_more(p)
            yield gauss_newton(p)


def gradient(p: Problem) -> Callable[[], object]:
    """Torch's, with flash attention."""
    def run() -> object:
        leaves = {name: t.detach().requires_grad_() for name, t in p.params.items()}
        math, Block.attention = Block.attention, staticmethod(nullcontext)
        try:
            return torch.autograd.grad(p.loss(leaves), list(leaves.values()))
        finally:
            Block.attention = staticmethod(math)

    return run


def flat(tree: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in (tree.values() if isinstance(tree, dict) else tree)])


def to_double(p: Problem, f: Callable[..., Any]) -> Callable[[], Tensor]:
    """The same product in float64."""
    def run() -> Tensor:
        x = p.x.double() if p.x.is_floating_point() else p.x
        up = lambda tree: {name: t.double() for name, t in tree.items()}
        outputs = lambda params: functional_call(p.model, params, (x,))
        return flat(f(outputs, up(p.params), up(p.v)))

    return run


def hessian_in(p: Problem) -> Callable[..., Any]:
    return lambda outputs, params, v: curvature.hvp(lambda q: F.cross_entropy(outputs(q), p.y), params, v)[1]


def error_of(exact: Callable[[], Tensor]) -> Callable[[Any], float]:
    measured = relative_error(exact)
    # The gradient is there for its time.
    return lambda result: float("nan") if result is None else measured(result)


def linear_operator(p: Problem, name: str) -> dict[str, Callable[[], Any]]:
    """That of curvlinops, where it is installed and takes the model."""
    if not find_spec("curvlinops"):
        return {}
    import curvlinops

    parameters, data = list(p.model.parameters()), [(p.x, p.y)]
    operator = getattr(curvlinops, name)(p.model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    v = flat(p.v)
    try:
        operator @ v
    except NotImplementedError:  # silu under its no_grad
        return {}
    return {"curvlinops": lambda: operator @ v}


def hessian(p: Problem) -> Case:
    names, tensors = list(p.params), tuple(p.params.values())

    def functional() -> Tensor:
        f = lambda *ts: p.loss(dict(zip(names, ts, strict=True)))
        return flat(torch.autograd.functional.hvp(f, tensors, tuple(p.v.values()))[1])

    peers: dict[str, Callable[[], Any]] = {"autograd.functional.hvp": functional}
    peers |= linear_operator(p, "HessianLinearOperator")
    peers["gradient"] = lambda: gradient(p)() and None
    return Case(
        "hvp", p.shape, torch.float32,
        ours=p.within(lambda: flat(curvature.hvp(p.loss, p.params, p.v)[1])),
        reference=lambda: flat(jvp(grad(p.loss), (p.params,), (p.v,))[1]), peers=peers,
        flops={torch.float32: 8 * p.forward}, error=error_of(to_double(p, hessian_in(p))),
    )  # fmt: skip


def one_more(p: Problem) -> Case:
    """A product when the gradient is there; torch.func.linearize keeps the same."""
    keep: list[curvature.LinearizedGrad] = []

    def ours() -> Tensor:
        if not keep:
            keep.append(curvature.linearize_grad(p.loss, p.params))
        return flat(keep[0](p.v))

    return Case(
        "linearize_grad, a product", p.shape, torch.float32, ours=p.within(ours),
        reference=lambda: flat(jvp(grad(p.loss), (p.params,), (p.v,))[1]),
        peers={"gradient": lambda: gradient(p)() and None}, flops={torch.float32: 6 * p.forward},
        error=error_of(to_double(p, hessian_in(p))),
    )  # fmt: skip


def gauss_newton(p: Problem) -> Case:
    def plain() -> Tensor:
        z, u = jvp(p.outputs, (p.params,), (p.v,))
        loss = lambda z: F.cross_entropy(z, p.y)
        w = jvp(grad(loss), (z,), (u,))[1]
        return flat(vjp(p.outputs, p.params)[1](w)[0])

    peers = linear_operator(p, "GGNLinearOperator")
    peers["gradient"] = lambda: gradient(p)() and None
    exact = to_double(p, lambda outputs, params, v: curvature.ggnvp(outputs, "cross_entropy", params, v))
    return Case(
        "ggnvp", p.shape, torch.float32,
        ours=p.within(lambda: flat(curvature.ggnvp(p.outputs, "cross_entropy", p.params, p.v))), reference=plain,
        peers=peers,
        flops={torch.float32: 5 * p.forward}, error=error_of(exact),
    )  # fmt: skip
