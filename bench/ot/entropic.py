"""Sinkhorn: a fixed number of iterations, and to a tolerance.

A fixed number is run at a regularisation that needs more, so that no one stops early. Ours then also measures its
marginals and its gap, two passes in float64, which the others do not.
"""
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops.ot import entropic

from ..harness import Case, Settings


def available(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # a peer that does not import is a peer that is not there
        return None


def uniform(costs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(torch.full((*costs.shape[:-2], size), 1 / size, dtype=dtype, device=costs.device)
                 for size in costs.shape[-2:])  # type: ignore[return-value]


def plain(costs: Tensor, reg: float, iterations: int, tol: float = 0.0) -> Tensor:
    """As people write it, in the costs' dtype: the plan."""
    a, b = uniform(costs, costs.dtype)
    scaled, f, g = -costs / reg, torch.zeros_like(a), torch.zeros_like(b)
    for k in range(iterations):
        g = b.log() - (scaled + f[..., None]).logsumexp(-2)
        new = a.log() - (scaled + g[..., None, :]).logsumexp(-1)
        if tol and k % 10 == 9 and ((f - new).expm1().abs() * a).sum() <= tol:
            break
        f = new
    return (scaled + f[..., None] + g[..., None, :]).exp()


def ours(reg: float, iterations: int, tol: float = 0.0, **costs: Tensor) -> Tensor:
    return entropic(**costs, reg=reg, tol=tol, max_iter=iterations)  # type: ignore[arg-type, return-value]


def pot(name: str, costs: Tensor, reg: float, iterations: int, tol: float = 0.0) -> dict[str, Callable[[], Any]]:
    module = available("ot.bregman")
    if module is None or costs.device.type != "cpu":
        return {}
    dtype = torch.float64 if name == "sinkhorn" else costs.dtype
    problems = [c.to(dtype).numpy() for c in costs.reshape(-1, *costs.shape[-2:])]
    a, b = (w.numpy() for w in uniform(costs.reshape(-1, *costs.shape[-2:])[0], dtype))
    options = {"numItermax": iterations, "stopThr": tol, "warn": False}
    return {f"POT {name}": lambda: torch.stack([
        torch.from_numpy(getattr(module, name)(a, b, c, reg, **options)) for c in problems])}


def ott(reg: float, iterations: int, costs: Tensor | None = None, x: Tensor | None = None, y: Tensor | None = None
        ) -> dict[str, Callable[[], Any]]:
    """Jitted; a batch is vmapped. Never stops early."""
    linear = available("ott.solvers.linear")
    if linear is None:
        return {}
    jax = importlib.import_module("jax")
    geometries = importlib.import_module("ott.geometry")
    for module in ("geometry", "pointcloud"):
        importlib.import_module(f"ott.geometry.{module}")
    options = {"threshold": 0.0, "min_iterations": iterations, "max_iterations": iterations}

    def solve(*arrays: Any) -> Any:
        geometry = (geometries.geometry.Geometry(*arrays, epsilon=reg) if costs is not None
                    else geometries.pointcloud.PointCloud(*arrays, epsilon=reg, scale_cost=1.0))
        return linear.solve(geometry, **options).f

    tensors = [t for t in (costs, x, y) if t is not None]
    arrays = [jax.numpy.asarray(t.numpy()) for t in tensors]
    run = jax.jit(jax.vmap(solve) if tensors[0].dim() > 2 else solve)
    return {"OTT-JAX": lambda: run(*arrays).block_until_ready()}


def points(settings: Settings, n: int, batch: tuple[int, ...] = (), d: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.rand(*batch, n, d, generator=g).to(settings.device) for _ in range(2))  # type: ignore[return-value]


def distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def marginal_error(result: Any) -> float:
    """Of a plan of uniform weights, measured in float64."""
    t = (result.plan.to_dense() if hasattr(result, "plan") else result).double()
    t = t.reshape(t.shape[-2:])
    return sum(float((t.sum(-1 - k) - 1 / t.shape[k]).abs().sum()) for k in (0, 1))


def fixed(settings: Settings, n: int, dtype: torch.dtype, reg: float = 0.005, iterations: int = 20) -> Case:
    costs = distances(*points(settings, n)).to(dtype)
    full = costs if dtype != torch.bfloat16 else costs.float()
    peers = pot("sinkhorn_log", full, reg, iterations) | pot("sinkhorn", full, reg, iterations)
    return Case("entropic", f"{n}x{n}", dtype, lambda: ours(reg, iterations, M=costs),
                lambda: plain(full, reg, iterations), peers | ott(reg, iterations, full), reads=True,
                bytes=iterations * costs.numel() * costs.element_size(), variant=f"{iterations} iterations")


def solved(settings: Settings, reg: float, limit: int = 20000) -> Case:
    costs = distances(*points(settings, 512))
    exact = 1e-6 / 512**0.5  # POT's norm is Euclidean
    peers = pot("sinkhorn_log", costs.double(), reg, limit, exact) | pot("sinkhorn", costs, reg, limit, exact)
    return Case("entropic", "512x512", costs.dtype, lambda: ours(reg, limit, 1e-6, M=costs),
                lambda: plain(costs.double(), reg, limit, 1e-6), peers, error=marginal_error,
                variant=f"reg {reg}, to 1e-6")


def cases(settings: Settings) -> Iterator[Case]:
    for n, dtype in ((256, torch.float32), (1024, torch.float32), (1024, torch.float64), (1024, torch.bfloat16)):
        yield fixed(settings, n, dtype)
    for reg in (0.05, 0.005):
        yield solved(settings, reg)
    reg, iterations = 0.005, 20
    costs = distances(*points(settings, 128, (64,)))
    peers = pot("sinkhorn_log", costs, reg, iterations) | ott(reg, iterations, costs)
    if batched := available("ot.batch"):
        peers["POT batch"] = lambda: batched.bregman_log_projection_batch(-costs / reg, max_iter=iterations, tol=0.0)
    yield Case("entropic", "64x128x128", costs.dtype, lambda: ours(reg, iterations, M=costs),
               lambda: plain(costs, reg, iterations), peers, reads=True, bytes=iterations * costs.numel() * 4,
               variant=f"{iterations} iterations")
    x, y = points(settings, 4096)
    peers = ott(reg, iterations, x=x, y=y)
    if geomloss := available("geomloss"):
        # Its costs are halved, and its number of iterations is what its schedule makes it: 20 here.
        loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=(reg / 2) ** 0.5, scaling=0.84, diameter=1.0, debias=False,
                                    backend="tensorized")
        peers["geomloss"] = lambda: loss(x, y)
    yield Case("entropic", "4096x4096 d=3", x.dtype, lambda: ours(reg, iterations, x=x, y=y),
               lambda: plain(distances(x, y), reg, iterations), peers, variant=f"{iterations} iterations")
