"""solve with max_nz against POT's semi-dual solver, both to their own stops: time, and distance to the dual's bound."""
import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import ot

from ..harness import Case, Settings
from .solve import points


def tokens(count: int, experts: int) -> Tensor:
    """Costs of a router: minus the probabilities, one column per token."""
    g = torch.Generator().manual_seed(0)
    return -torch.randn(count, experts, generator=g).softmax(-1).T.contiguous()


def pot(M: Tensor, a: Tensor, b: Tensor, reg: float, k: int) -> dict[str, Callable[[], Any]]:
    try:
        from ot.smooth import smooth_ot_semi_dual
    except ImportError:
        return {}
    weights, costs = (a.cpu().numpy(), b.cpu().numpy()), M.double().cpu().numpy()

    def run() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            return smooth_ot_semi_dual(*weights, costs, reg, reg_type="sparsity_constrained", max_nz=k, log=True)

    return {"POT": run}


def dual_value(result: Any, M: Tensor, a: Tensor, b: Tensor, reg: float, k: int) -> float:
    """The semi-dual at a result's alpha, from its definition."""
    alpha = result.potentials.alpha if isinstance(result, ot.OTResult) else torch.as_tensor(result[1]["alpha"])
    x = (alpha.cpu()[:, None] - M.double().cpu()).topk(k, 0).values
    tau = ((x.cumsum(0) - reg * b.cpu()) / torch.arange(1, k + 1, dtype=torch.float64)[:, None]).max(0).values
    t = (x - tau).clamp(min=0) / reg
    return float(alpha.cpu() @ a.cpu() - (x * t).sum() + reg / 2 * (t * t).sum())


def cases(settings: Settings) -> Iterator[Case]:
    square = points(128 if settings.quick else 256, settings)
    problems = [(square, reg, 2) for reg in (1.0, 10.0, 100.0)]
    problems += [(square, 1.0, 1), (square, 1.0, square.shape[0])]
    if not settings.quick:
        router = tokens(1024, 32).to(settings.device)
        problems += [(router, 1.0, 2), (router.T.contiguous(), 1.0, 64)]
    for M, reg, k in problems:
        n, m = M.shape
        mass = 1.0 if n == m else 1024.0
        a, b = (torch.full((s,), mass / s, dtype=torch.float64, device=M.device) for s in (n, m))
        bound = float(ot.solve(M, a, b, reg=reg, max_nz=k).value)  # no alpha is better

        def short(result: Any, M: Tensor = M, a: Tensor = a, b: Tensor = b, reg: float = reg, k: int = k,
                  bound: float = bound) -> float:
            return (bound - dual_value(result, M, a, b, reg, k)) / abs(bound)

        yield Case("solve", f"{n}x{m}", M.dtype, variant=f"reg {reg:g}, max_nz {k}, below the bound",
                   ours=lambda M=M, a=a, b=b, r=reg, k=k: ot.solve(M, a, b, reg=r, max_nz=k),
                   peers=pot(M, a, b, reg, k) if k < n else {}, error=short, bytes=float(M.nbytes),
                   reads=True)  # fmt: skip
