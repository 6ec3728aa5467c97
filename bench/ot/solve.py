"""solve without max_nz against POT's semi-dual solver, both to their own stops, and batches against loops."""
import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import ot

from ..harness import Case, Settings


def points(n: int, settings: Settings, batch: tuple[int, ...] = ()) -> Tensor:
    """Squared distances of Gaussian points in the plane, divided by their maximum."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*batch, n, 2, generator=g, dtype=torch.float64) for _ in range(2))
    M = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return (M / M.amax((-2, -1), keepdim=True)).float().to(settings.device)


def histograms(settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The first example of POT's documentation: two Gaussians over 100 bins, whose tails weigh next to nothing."""
    x = torch.arange(100, dtype=torch.float64)
    a, b = (torch.exp(-((x - mean) / scale).square() / 2) for mean, scale in ((20, 5), (60, 10)))
    M = (x[:, None] - x).square()
    M = M / M.max()
    return M.float().to(settings.device), (a / a.sum()).to(settings.device), (b / b.sum()).to(settings.device)


def row_error(plan: Any, a: Tensor | None = None) -> float:
    """What the rows of a plan lack, relative to the mass; uniform weights by default."""
    T = plan.plan.to_dense().cpu() if isinstance(plan, ot.OTResult) else torch.as_tensor(plan)
    return float((T.sum(-1) - (1 / T.shape[-2] if a is None else a.cpu())).abs().sum(-1).max())


def pot(M: Tensor, reg: float, a: Tensor | None = None, b: Tensor | None = None) -> dict[str, Callable[[], Any]]:
    try:
        from ot.smooth import smooth_ot_semi_dual
    except ImportError:
        return {}
    C, uniform = M.double().cpu().numpy(), torch.full((len(M),), 1 / len(M), dtype=torch.float64)
    rows, columns = ((uniform if w is None else w.cpu()).numpy() for w in (a, b))

    def run() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            return smooth_ot_semi_dual(rows, columns, C, reg)

    return {"POT": run}


def network_simplex(M: Tensor, a: Tensor, b: Tensor) -> dict[str, Callable[[], Any]]:
    try:
        from ot.lp import emd
    except ImportError:
        return {}
    C, rows, columns = (t.double().cpu().numpy() for t in (M, a, b))
    return {"POT emd": lambda: emd(rows, columns, C, numItermax=10_000_000)}


def cases(settings: Settings) -> Iterator[Case]:
    for n, reg in ((256, 10.0), (256, 1.0), (256, 0.1), (256, 0.01), (1024, 10.0), (1024, 1.0)):
        if settings.quick and n > 256:
            continue
        M = points(n, settings)
        yield Case("solve", f"{n}x{n}", torch.float32, variant=f"reg {reg:g}",
                   ours=lambda M=M, r=reg: ot.solve(M, reg=r),
                   peers=pot(M, reg) if reg >= 0.1 else {}, error=row_error, bytes=4.0 * n * n, reads=True)  # fmt: skip
    M, a, b = histograms(settings)
    for reg in (10.0, 0.1):
        yield Case("solve", "100x100", torch.float32, variant=f"reg {reg:g}, histograms",
                   ours=lambda r=reg: ot.solve(M, a, b, reg=r), peers=pot(M, reg, a, b),
                   error=lambda plan: row_error(plan, a), bytes=4.0 * M.numel(), reads=True)  # fmt: skip
    # So little reg that the plan is that of linear programming.
    n = 256 if settings.quick else 1024
    uniform = torch.full((n,), 1 / n, dtype=torch.float64, device=settings.device)
    g = torch.Generator().manual_seed(0)
    random, *weights = (torch.rand(*shape, generator=g, dtype=torch.float64) for shape in ((n, n), (n,), (n,)))
    weights = [(w / w.sum()).to(settings.device) for w in weights]
    for name, M, a, b in (("points", points(n, settings), uniform, uniform),
                          ("random costs and weights", random.float().to(settings.device), *weights)):
        yield Case("solve", f"{n}x{n}", torch.float32, variant=f"reg 1e-6, {name}",
                   ours=lambda M=M, a=a, b=b: ot.solve(M, a, b, reg=1e-6), peers=network_simplex(M, a, b),
                   error=lambda plan, a=a: row_error(plan, a), bytes=4.0 * n * n, reads=True)  # fmt: skip
    count, n = (8, 64) if settings.quick else (64, 128)
    many = points(n, settings, (count,))
    yield Case("solve", f"{count}x{n}x{n}", torch.float32, variant="reg 1, against a loop of calls",
               ours=lambda: ot.solve(many), reference=lambda: [ot.solve(M) for M in many],
               bytes=4.0 * many.numel(), reads=True)  # fmt: skip
    if not settings.quick:
        large = points(2048, settings)
        yield Case("solve", "2048x2048", torch.float32, variant="reg 1", ours=lambda: ot.solve(large), error=row_error,
                   bytes=4.0 * large.numel(), reads=True)  # fmt: skip
