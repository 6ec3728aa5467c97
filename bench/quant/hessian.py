"""Cases of hessian_update_, gptaq_cross_update_ and hessian_factor."""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradops.quant import gptaq_cross_update_, hessian_factor, hessian_update_

from ..harness import Case, Settings, relative_error

TOKENS = 2048


def cases(settings: Settings) -> Iterator[Case]:
    yield from hessian_update(settings)
    yield from experts(settings)
    yield from gptaq_cross_update(settings)
    yield from factor(settings)


def activations(shape: tuple[int, ...], settings: Settings) -> Tensor:
    """Features of uneven size."""
    g = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=g) * torch.randn(shape[-1], generator=g).exp()).to(settings.device)


def sizes(settings: Settings) -> list[int]:
    return [1024] if settings.quick else [1024, 2048, 4096]


def hessian_error(x: Tensor) -> Callable[[Tensor], float]:
    """The largest |d_ij| / sqrt(H_ii H_jj), in float64."""
    want = x.double().mT @ x.double() * (2 / x.shape[-2])
    d = want.diagonal(0, -2, -1).sqrt()

    def error(h: Tensor) -> float:
        return float(((h.double() - want).abs() / (d[..., :, None] * d[..., None, :])).max())

    return error


def ours(x: Tensor, h: Tensor, precision: str) -> Tensor:
    hessian_update_(h.zero_(), x, 0, precision=precision)  # the zeros are an honest, small part of the time
    return h


def hessian_update(settings: Settings) -> Iterator[Case]:
    """torch: in the dtype of the input (bfloat16 rounds the sums), and from float32 for bfloat16 input as GPTQ code
    does."""
    for dtype in (torch.bfloat16, torch.float32):
        for n in sizes(settings):
            x = activations((TOKENS, n), settings).to(dtype)
            h = torch.zeros(n, n, device=settings.device)
            for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
                yield Case(
                    "hessian_update_", f"{TOKENS}x{n}", dtype, variant=precision if dtype == torch.float32 else "",
                    ours=lambda x=x, h=h, p=precision: ours(x, h, p),
                    reference=lambda x=x, h=h: h.zero_().addmm_(x.float().T, x.float(), alpha=2 / TOKENS),
                    peers={"torch bfloat16": lambda x=x: (x.T @ x) * (2 / TOKENS)} if dtype == torch.bfloat16 else {},
                    flops={dtype: float(TOKENS * n * n)}, bytes=float(x.numel() * x.element_size() + 8 * n * n),
                    error=hessian_error(x),
                )  # fmt: skip


def experts(settings: Settings) -> Iterator[Case]:
    """Experts that see a few tokens each, selected by a mask; torch: a loop with index_select."""
    count, n, tokens = (4, 640, 512) if settings.quick else (32, 640, 2048)
    x = activations((tokens, n), settings).bfloat16()
    mask = torch.rand(count, tokens, generator=torch.Generator().manual_seed(1)).to(settings.device) < 2 / count
    h = torch.zeros(count, n, n, device=settings.device)
    every = x.expand(count, tokens, n).contiguous()

    def call() -> Tensor:
        hessian_update_(h.zero_(), every, 0, mask=mask)
        return h

    def loop() -> Tensor:
        for i in range(count):
            rows = x[mask[i]].float()
            h[i] = rows.T @ rows * (2 / len(rows))
        return h

    yield Case(
        "hessian_update_", f"{count}x{tokens}x{n}", torch.bfloat16, variant="experts", ours=call, reference=loop,
        flops={torch.bfloat16: float(int(mask.sum()) * n * n)}, bytes=float(h.numel() * 8),
        error=relative_error(lambda: torch.stack([
            x[m].double().T @ x[m].double() * (2 / int(m.sum())) for m in mask])),
    )  # fmt: skip


def gptaq_cross_update(settings: Settings) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for n in sizes(settings)[:2]:
            x = activations((TOKENS, n), settings)
            x_q = (x + 0.02 * activations((TOKENS, n), settings).flip(0)).to(dtype)
            x = x.to(dtype)
            d = torch.zeros(n, n, device=settings.device)

            def call(x: Tensor = x, x_q: Tensor = x_q, d: Tensor = d) -> Tensor:
                gptaq_cross_update_(d.zero_(), x, x_q, 0)
                return d

            def plain(x: Tensor = x, x_q: Tensor = x_q, d: Tensor = d) -> Tensor:
                return d.zero_().addmm_((x.float() - x_q.float()).T, x_q.float(), alpha=2 / TOKENS)

            yield Case(
                "gptaq_cross_update_", f"{TOKENS}x{n}", dtype, ours=call, reference=plain,
                flops={torch.float32: float(2 * TOKENS * n * n)},
                bytes=float(2 * x.numel() * x.element_size() + 8 * n * n),
                error=relative_error(lambda x=x, x_q=x_q: (x.double() - x_q.double()).T @ x_q.double() * (2 / TOKENS)),
            )  # fmt: skip


def usual_factor(h: Tensor) -> Tensor:
    """As GPTQ code does it: Cholesky, inverse, Cholesky."""
    damped = h + 0.01 * h.diagonal(0, -2, -1).mean(-1)[..., None, None] * torch.eye(h.shape[-1], device=h.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def factor(settings: Settings) -> Iterator[Case]:
    for shape in [(1024,)] if settings.quick else [(1024,), (2048,), (4096,), (32, 640)]:
        n = shape[-1]
        x = activations((*shape[:-1], 2 * n, n), settings)
        h = x.mT @ x / n
        label = "x".join(map(str, (*shape, n)))
        for inverse in (True, False):
            yield Case(
                "hessian_factor", label, torch.float32, variant="" if inverse else "R",
                ours=lambda h=h, i=inverse: hessian_factor(h, inverse=i)[0],
                reference=lambda h=h: usual_factor(h),
                flops={torch.float32: float(h.numel() * n) * (2 / 3 if inverse else 1 / 3)}, bytes=8.0 * h.numel(),
                error=relative_error(lambda h=h: usual_factor(h.double())) if inverse else None,
            )  # fmt: skip
