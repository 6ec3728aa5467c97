"""Cases of router. torch: the same steps in plain PyTorch with topk. jaxopt: its solver as V-MoE calls it. Two other
ways to route stand beside them for what they cost: softmax top-k (no balance at all), and Sinkhorn to a tolerance of
1e-4.

error: the share of the assignments of the float64 reference that are missing."""
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gradops.ot import reference, router

from ..harness import Case, Settings

STEPS, RATE = 20, 1e-2


def cases(settings: Settings) -> Iterator[Case]:
    for shape, top_k, capacity in (((1, 1024, 32), 2, 64), ((8, 1024, 8), 2, 256), ((1, 256, 64), 2, 8)):
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(shape, generator=g) + torch.randn(shape[-1], generator=g) / 2  # uneven experts
        logits = logits.to(settings.device)
        name = "x".join(map(str, shape[shape[0] == 1 :]))
        arguments: dict[str, Any] = {"top_k": top_k}
        peers: dict[str, Callable[[], Any]] = {"softmax top-k": lambda x=logits, k=top_k: softmax_top_k(x, k),
                                               "Sinkhorn": lambda x=logits, k=top_k: sinkhorn(x, k)}
        yield case(settings, f"{name} top {top_k}", logits, arguments, peers)
        if shape[0] == 1 and not settings.quick:
            yield case(settings, f"{name} top {top_k}, capacity {capacity}", logits,
                       arguments | {"capacity": capacity}, {})
        peers = {"softmax top-k": lambda x=logits, k=capacity: softmax_top_k(x.mT, k)}
        yield case(settings, f"{name} experts take {capacity}", logits,
                   {"mode": "experts_choose", "capacity": capacity}, peers)


def case(settings: Settings, shape: str, logits: Tensor, arguments: dict[str, Any],
         peers: dict[str, Callable[[], Any]]) -> Case:
    choose = "mode" in arguments
    k = arguments["capacity"] if choose else arguments["top_k"]
    plain = None if "capacity" in arguments and not choose else lambda: adam(logits, k, choose)
    if plain and settings.device == "cpu" and find_spec("jaxopt"):
        peers = peers | {"jaxopt": jaxopt_solver(logits, k, choose)}
    wanted: list[Tensor] = []

    def error(y: Any) -> float:
        if not wanted:
            wanted.append(routes(reference.router(logits.double(), **arguments), logits, choose))
        return float((wanted[0] & ~routes(y, logits, choose)).sum() / wanted[0].sum())

    return Case("router", shape, logits.dtype, ours=lambda: router(logits, **arguments), reference=plain, peers=peers,
                bytes=float(logits.numel() * logits.element_size()), reads=True, error=error)


def routes(y: Any, logits: Tensor, experts_choose: bool) -> Tensor:
    """Who is assigned to whom, densely."""
    if isinstance(y, Tensor) and y.is_floating_point():
        return y > 0
    indices = y if isinstance(y, Tensor) else y[0]
    like = logits.mT if experts_choose else logits
    out = torch.zeros(*like.shape[:-1], like.shape[-1] + 1, dtype=torch.bool, device=logits.device)
    out.scatter_(-1, torch.where(indices < 0, like.shape[-1], indices), True)
    return out[..., :-1].mT if experts_choose else out[..., :-1]


def adam(logits: Tensor, k: int, experts_choose: bool) -> Tensor:
    """The plan, on torch.topk."""
    gates = logits.softmax(-1)
    tokens, experts = gates.shape[-2:]
    x = gates.mT if experts_choose else gates  # (columns, rows)
    row, column = (1.0, tokens / experts) if experts_choose else (tokens / experts, 1.0)
    size = torch.arange(1, k + 1, device=x.device)

    def plan(alpha: Tensor) -> Tensor:
        values, rows = (x + alpha[..., None, :]).topk(k)
        tau = ((values.cumsum(-1) - column) / size).amax(-1, keepdim=True)
        return torch.zeros_like(x).scatter_(-1, rows, (values - tau).relu())

    alpha = x.new_zeros(*x.shape[:-2], x.shape[-1])
    m, v = torch.zeros_like(alpha), torch.zeros_like(alpha)
    for step in range(1, STEPS + 1):
        grad = plan(alpha).sum(-2) - row
        m.lerp_(grad, 0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=0.001)
        alpha.addcdiv_(m, (v / (1 - 0.999**step)).sqrt_().add_(1e-8), value=-RATE / (1 - 0.9**step))
    out = plan(alpha)
    return out.mT if experts_choose else out


def softmax_top_k(logits: Tensor, k: int) -> Tensor:
    return logits.softmax(-1).topk(k).indices


def sinkhorn(logits: Tensor, k: int) -> Tensor:
    """As Megatron-LM balances: scalings of exp(logits) until they stop to move, then the k largest."""
    cost = logits.float().exp()
    tokens, experts = cost.shape[-2:]
    right = cost.new_ones(*cost.shape[:-2], 1, experts)
    moved = 1.0
    while moved > 1e-4:
        left = 1 / (tokens * (right * cost).sum(-1, keepdim=True) + 1e-8)
        before, right = right, 1 / (experts * (left * cost).sum(-2, keepdim=True) + 1e-8)
        moved = float((right - before).abs().mean())
    return (left * cost * right).topk(k).indices


def jaxopt_solver(logits: Tensor, k: int, experts_choose: bool) -> Callable[[], Tensor]:
    import jax
    import jax.numpy as jnp
    import jaxopt
    import optax

    tokens, experts = logits.shape[-2:]
    row, column = (1.0, tokens / experts) if experts_choose else (tokens / experts, 1.0)

    def project(x):  # column by column
        return column * jaxopt.projection.projection_sparse_simplex(x / column, k)

    def value(alpha, x):
        values = x + alpha
        plan = jax.lax.stop_gradient(jax.vmap(project)(values))
        return (plan * values - plan**2 / 2).sum() - row * alpha.sum()

    solver = jaxopt.OptaxSolver(value, optax.adam(RATE), maxiter=STEPS)

    def one(gates):
        x = gates.T if experts_choose else gates
        alpha = solver.run(jnp.zeros(x.shape[1]), x).params
        plan = jax.vmap(project)(x + alpha)
        return plan.T if experts_choose else plan

    solve = jax.jit(jax.vmap(lambda z: one(jax.nn.softmax(z))))
    z = jnp.asarray(logits.flatten(0, -3).numpy())
    return lambda: torch.from_numpy(jax.device_get(solve(z).block_until_ready()).copy()).reshape(logits.shape)
