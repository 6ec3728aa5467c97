"""gptq_quantize and packing against the column loop as people write it in torch."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import quant
from gradops.quant.gptq_spread import gptq_spread_

from ..harness import Case, Settings

BITS, GROUP, BLOCK = 4, 128, 128
MOST = 2**BITS - 1


def problem(lead: tuple[int, ...], rows: int, n: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the Hessian of correlated inputs, and GPTAQ's D."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, n, generator=g) * torch.exp(0.7 * torch.randn(n, generator=g))
    X += torch.randn(n, 64, generator=g) @ torch.randn(64, n, generator=g) / 8
    W = 0.02 * torch.randn(*lead, rows, n, generator=g)
    H, D = 2 / n * X.T @ X, 0.2 / n * torch.randn(X.shape, generator=g).T @ X
    return W.to(settings.device), H.to(settings.device), D.to(settings.device)


def torch_factor(H: Tensor) -> Tensor:
    """Cholesky, inverse, Cholesky."""
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(H.shape[-1], device=H.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def torch_pull(D: Tensor, U: Tensor, alpha: float = 0.25) -> Tensor:
    return alpha * (D @ U.T).triu(1) @ U


def torch_columns(W: Tensor, U: Tensor, beta: float = 0.0, P: Tensor | None = None,
                  scales: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The loop of the methods' authors: a handful of torch calls per column. Codes, scales, weight."""
    W0, W, Q, codes = W, W.clone(), torch.empty_like(W), torch.empty_like(W)
    used = W.new_empty(W.shape[0], W.shape[1] // GROUP) if scales is None else scales
    zero = (MOST + 1) / 2
    for begin in range(0, W.shape[1], BLOCK):
        end = min(begin + BLOCK, W.shape[1])
        w, u, e = W[:, begin:end].clone(), U[begin:end, begin:end], torch.zeros_like(W[:, begin:end])
        for i in range(end - begin):
            if i % GROUP == 0:
                at = (begin + i) // GROUP
                if scales is None:
                    used[:, at] = 2 * w[:, i : i + GROUP].abs().amax(1) / MOST
                scale = used[:, at]
            now, diagonal = w[:, i], u[i, i]
            code = torch.clamp(torch.round(now / scale) + zero, 0, MOST)
            q = scale * (code - zero)
            codes[:, begin + i], Q[:, begin + i] = code, q
            moved = (now - q) - beta * (now - W0[:, begin + i]) if beta else now - q
            e[:, i] = moved / diagonal
            if P is None:
                w[:, i:] -= e[:, i, None].matmul(u[i, i:][None])
            else:
                extra = now[:, None].matmul(P[begin + i, begin + i : end][None])
                w[:, i:] -= e[:, i, None].matmul(u[i, i:][None]) - extra
            if beta and i + 1 < end - begin:
                w[:, i + 1] -= beta * (w[:, i + 1] - W0[:, begin + i + 1])
        W[:, end:] -= e.matmul(U[begin:end, end:])
        if P is not None:
            W[:, end:] += w.matmul(P[begin:end, end:])
    return codes, used, Q


def different_codes(exact: Callable[[Tensor], Tensor]) -> Callable[[Any], float]:
    """The share of codes that differ from the float64 loop's with the same factor and scales."""
    return lambda result: float((result[0].double() != exact(result[1].double())).double().mean())


def cases(settings: Settings) -> Iterator[Case]:
    rows, n = (256, 512) if settings.quick else (1024, 4096)
    W, H, D = problem((), rows, n, settings)
    U = torch_factor(H)
    P = torch_pull(D, U)
    lazy = {torch.float32: float(rows * n * n)}  # FLOPs of the products between blocks
    for method, beta, pull in (("gptq", 0.0, None), ("foem", 0.2, None), ("gptaq", 0.0, P)):
        extra = {} if pull is None else {"D": D}
        shape = f"{rows}x{n}"
        yield Case(
            "gptq_quantize", shape, torch.float32, variant=f"{method}, factor given",
            ours=lambda m=method, x=extra: quant.gptq_quantize(W, H, factor=U, method=m, compat="authors", **x),
            reference=lambda b=beta, d=D if extra else None: torch_columns(
                W, U, b, None if d is None else torch_pull(d, U)),
            flops=lazy if pull is None else {torch.float32: 2 * lazy[torch.float32] + n**3 / 3},
            error=different_codes(lambda scales, b=beta, p=pull: torch_columns(
                W.double(), U.double(), b, None if p is None else p.double(), scales)[0]),
        )  # fmt: skip
        yield Case(
            "gptq_quantize", shape, torch.float32, variant=f"{method} and factor",
            ours=lambda m=method, x=extra: quant.gptq_quantize(W, H, method=m, compat="authors", **x),
            reference=lambda b=beta, d=D if extra else None: _torch_all(W, H, b, d),
            flops={torch.float32: lazy[torch.float32] + n**3 / 3 if pull is None
                   else 2 * lazy[torch.float32] + n**3 * 2 / 3},
        )  # fmt: skip
        yield from columns_only(method, beta, pull, W, U)
    yield from square_layer(settings)
    yield from spread(settings)
    yield from experts(settings)
    yield from packing(settings)


def square_layer(settings: Settings) -> Iterator[Case]:
    """All rows of one layer."""
    n = 512 if settings.quick else 4096
    W, H, _ = problem((), n, n, settings)
    yield Case("gptq_quantize", f"{n}x{n}", torch.float32, variant="gptq and factor",
               ours=lambda: quant.gptq_quantize(W, H), reference=lambda: _torch_all(W, H, 0.0, None),
               flops={torch.float32: n**3 * 4 / 3})  # fmt: skip


def spread(settings: Settings) -> Iterator[Case]:
    """What the first half of the columns leaves for the block after it."""
    rows, n = (256, 512) if settings.quick else (1024, 4096)
    g = torch.Generator().manual_seed(0)
    w, e, u = (torch.randn(1, *shape, generator=g).to(settings.device) for shape in
               ((rows, n), (rows, n), (n, n)))  # fmt: skip
    half = n // 2
    parts = w[:, :, half : half + BLOCK], e[:, :, :half], u[:, :half, half : half + BLOCK]

    def plain() -> Tensor:
        return parts[0].baddbmm_(*parts[1:], alpha=-1)

    yield Case("gptq_spread_", f"{rows}x{half}x{BLOCK}", torch.float32, ours=lambda: gptq_spread_(*parts),
               reference=plain, flops={torch.float32: 2.0 * rows * half * BLOCK})  # fmt: skip


def _torch_all(W: Tensor, H: Tensor, beta: float, D: Tensor | None) -> tuple[Tensor, ...]:
    U = torch_factor(H)
    return torch_columns(W, U, beta, None if D is None else torch_pull(D, U))


def columns_only(method: str, beta: float, P: Tensor | None, W: Tensor, U: Tensor) -> Iterator[Case]:
    """One block, without the product that follows."""
    w, u = W[:, :BLOCK], U[:BLOCK, :BLOCK].contiguous()
    p = None if P is None else P[:BLOCK, :BLOCK].contiguous()
    op = torch.ops.gradops.gptq_block

    def ours() -> Any:
        return op(w[None], u[None], w[None] if beta else None, None if p is None else p[None], None, None, None, None,
                  GROUP, BITS, True, False, 0.0, 0, 0, beta, False, True)  # fmt: skip

    yield Case("gptq_block", f"{W.shape[0]}x{BLOCK}", torch.float32, variant=method, ours=ours,
               reference=lambda: torch_columns(w, u, beta, p),
               flops={torch.float32: float(W.shape[0] * BLOCK * BLOCK * (1 if p is None else 2))},
               bytes=float(4 * w.numel() * 3 + w.numel()))  # fmt: skip


def experts(settings: Settings) -> Iterator[Case]:
    count, rows, n = (4, 64, 256) if settings.quick else (32, 640, 2560)
    W, H, _ = problem((count,), rows, n, settings)
    U = torch_factor(H)
    yield Case(
        "gptq_quantize", f"{count}x{rows}x{n}", torch.float32, variant="experts, factor given",
        ours=lambda: quant.gptq_quantize(W, H, factor=U),
        reference=lambda: [torch_columns(w, U) for w in W],
        peers={"one by one": lambda: [quant.gptq_quantize(w, H, factor=U) for w in W]},
        flops={torch.float32: float(count * rows * n * n)},
    )  # fmt: skip
    yield Case(
        "gptq_quantize", f"{count}x{rows}x{n}", torch.float32, variant="experts of one Hessian",
        ours=lambda: quant.gptq_quantize(W, H),
        peers={"one by one": lambda: [quant.gptq_quantize(w, H) for w in W]},
        flops={torch.float32: float(count * rows * n * n) + n**3 / 3},
    )  # fmt: skip


def torch_pack(codes: Tensor) -> Tensor:
    """4 bits: eight codes to a word."""
    words = codes.mT.to(torch.int32).unflatten(-2, (-1, 8))
    out = words[..., 0, :]
    for k in range(1, 8):
        out = out | words[..., k, :] << (4 * k)
    return out


def packing(settings: Settings) -> Iterator[Case]:
    rows, n = (256, 512) if settings.quick else (4096, 4096)
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (rows, n), dtype=torch.uint8, generator=g).to(settings.device)
    op = torch.ops.gradops
    words = op.gptq_pack(codes, 4, True)
    yield Case("gptq_pack", f"{rows}x{n}", torch.uint8, variant="4 bits", ours=lambda: op.gptq_pack(codes, 4, True),
               reference=lambda: torch_pack(codes), bytes=1.5 * codes.numel())  # fmt: skip
    yield Case("gptq_unpack", f"{rows}x{n}", torch.uint8, variant="4 bits",
               ours=lambda: op.gptq_unpack(words, 4, n, True),
               reference=lambda: (words[:, None] >> 4 * torch.arange(8, device=words.device)[:, None] & 15).flatten(
                   0, 1).mT.to(torch.uint8).contiguous(),
               bytes=1.5 * codes.numel())  # fmt: skip
