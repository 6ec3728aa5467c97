"""Cases of sparse_simplex_projection and semidual: how fast one evaluation is, beside one read of the costs.

Costs are squared distances of two clouds of Gaussian points, divided by their maximum, as POT's examples have them;
weights are uniform. alpha is where L-BFGS is after 20 evaluations, and the step after that is measured.
"""
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gradops import ot
from gradops.ot import reference

from ..harness import Case, Settings, relative_error


def costs(n: int, m: int, device: str) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 2, generator=g), torch.randn(m, 2, generator=g) + 0.5
    M = torch.cdist(x.double(), y.double()).square()
    return (M / M.max()).to(device)


def steps(evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], n: int, device: str) -> tuple[Tensor, Tensor]:
    """Two potentials that follow each other in a solver, after 20 evaluations."""
    seen: list[Tensor] = []
    alpha = torch.zeros(n, dtype=torch.float64, device=device, requires_grad=True)
    solver = torch.optim.LBFGS([alpha], max_iter=25, max_eval=25, tolerance_grad=0, tolerance_change=0,
                               line_search_fn="strong_wolfe", lr=1)

    def closure() -> Tensor:
        seen.append(alpha.detach().clone())
        value, grad = evaluate(seen[-1])
        alpha.grad = -grad * n  # scaled as a mean over rows would be: L-BFGS does not mind
        return -value * n

    solver.step(closure)
    return seen[-2], seen[-1]


def pot(alpha: Tensor, M: Tensor, a: Tensor, b: Tensor, reg: float, max_nz: int | None) -> dict[str, Callable[[], Any]]:
    """POT's own objective and gradient: NumPy in float64."""
    if M.is_cuda or not find_spec("ot"):
        return {}
    import contextlib
    import io

    from ot import smooth

    regularization = smooth.SquaredL2(reg) if max_nz is None else smooth.SparsityConstrained(max_nz, reg)
    arrays = [t.double().numpy() for t in (alpha, a, b, M)]

    def evaluate() -> tuple[Tensor, Tensor]:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line per evaluation
            value, grad = smooth.semi_dual_obj_grad(*arrays, regularization)
        return torch.tensor(value), torch.from_numpy(grad)

    return {"POT": evaluate}


def semidual_cases(n: int, max_nz: int | None, reg: float, dtype: torch.dtype, settings: Settings) -> Iterator[Case]:
    device = settings.device
    exact = costs(n, n, device)
    M = exact.to(dtype)
    a, b = (torch.full((n,), 1 / n, dtype=torch.float64, device=device) for _ in range(2))
    width = min(n, 64) if max_nz is None else None
    before, alpha = steps(lambda t: ot.semidual(t, M, a, b, reg, max_nz, width=width)[:2], n, device)
    _, _, plan, tau = ot.semidual(before, M, a, b, reg, max_nz, width=width)
    compute = torch.float32 if dtype != torch.float64 else dtype

    def plain() -> tuple[Any, ...]:
        return reference.semidual(alpha.to(compute), M.to(compute), a.to(compute), b.to(compute), reg, max_nz)

    error = relative_error(lambda: reference.semidual(alpha, M.double(), a, b, reg, max_nz)[1])
    for variant, warm in (("moved by a step", (before, plan, tau)), ("cold", None)):
        yield Case(
            op=f"semidual max_nz={max_nz} reg={reg:g}", shape=f"{n}x{n}", dtype=dtype, variant=variant,
            ours=lambda warm=warm: ot.semidual(alpha, M, a, b, reg, max_nz, warm=warm, width=width),
            reference=plain, peers=pot(alpha, M, a, b, reg, max_nz), bytes=M.numel() * M.element_size(), reads=True,
            error=lambda out: error(out[1]),
        )  # fmt: skip


def projection_case(vectors: int, size: int, max_nz: int | None, dtype: torch.dtype, settings: Settings) -> Case:
    X = torch.randn(vectors, size, generator=torch.Generator().manual_seed(0)).to(dtype).to(settings.device)

    def dense(out: tuple[Tensor, ...]) -> Tensor:
        return torch.zeros(vectors, size, dtype=torch.float64, device=X.device).scatter(-1, out[1], out[0].double())

    error = relative_error(lambda: dense(reference.sparse_simplex_projection(X.double(), max_nz)))
    return Case(
        op=f"sparse_simplex_projection max_nz={max_nz}", shape=f"{vectors}x{size}", dtype=dtype,
        ours=lambda: ot.sparse_simplex_projection(X, max_nz),
        reference=lambda: reference.sparse_simplex_projection(X, max_nz),
        bytes=X.numel() * X.element_size(), reads=True, error=lambda out: error(dense(out)),
    )  # fmt: skip


def cases(settings: Settings) -> Iterator[Case]:
    for max_nz, reg in ((4, 10.0), (16, 10.0), (None, 10.0)):
        yield from semidual_cases(1024, max_nz, reg, torch.float32, settings)
    yield from semidual_cases(1024, 4, 10.0, torch.bfloat16, settings)
    yield from semidual_cases(2048, 4, 10.0, torch.float32, settings)
    for vectors, size, max_nz, dtype in ((1024, 1024, 4, torch.float32), (1024, 1024, 16, torch.float32),
                                         (1024, 1024, None, torch.float32), (16, 50257, 8, torch.bfloat16)):
        yield projection_case(vectors, size, max_nz, dtype, settings)
