"""Gram matrices and the truncated pseudoinverse."""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradops import linalg

from ..harness import Case, Settings, relative_error
from .polar import gaussian, label

SHAPES = [(128, 100_000), (512, 50_000), (64, 32, 2000)]
CHUNK = 8192
RTOL = 1e-3


def cases(settings: Settings) -> Iterator[Case]:
    yield from gram(settings)
    yield from spectral_solve(settings)
    yield from jt_apply(settings)
    yield from pinv_apply(settings)


def torch_gram(J: Tensor) -> Tensor:
    """In float64 without a float64 copy of J."""
    parts = (x.double() for x in J.split(CHUNK, -1))
    return sum(x @ x.mT for x in parts)  # type: ignore[return-value]


def gram(settings: Settings) -> Iterator[Case]:
    for shape in [(32, 4000)] if settings.quick else SHAPES:
        J = gaussian(shape, torch.float32, settings)
        work = float(J.numel() * J.shape[-2])  # the lower triangle
        for accumulate in (torch.float64, torch.float32):
            wide = accumulate == torch.float64
            yield Case(
                "gram", label(shape), torch.float32, variant="" if wide else "fp32 sums",
                ours=lambda J=J, a=accumulate: linalg.gram(J, accumulate=a),
                reference=lambda J=J: J @ J.mT,
                peers={"torch float64, in chunks": lambda J=J: torch_gram(J)} if wide else {},
                flops={accumulate: work}, bytes=float(4 * J.numel()), reads=True,
                error=relative_error(lambda J=J: torch_gram(J)),
            )  # fmt: skip


def spectral_solve(settings: Settings) -> Iterator[Case]:
    for shape in [(32, 32)] if settings.quick else [(64, 32, 32), (128, 128), (512, 512)]:
        x = gaussian(shape, torch.float64, settings)
        G, r = linalg.gram(x), x[..., 0].contiguous()
        yield Case(
            "spectral_solve", label(shape), torch.float64,
            ours=lambda G=G, r=r: linalg.spectral_solve(G, r)[0],
            reference=lambda G=G, r=r: (torch.linalg.pinv(G, rtol=1e-6, hermitian=True) @ r[..., None])[..., 0],
            bytes=float(8 * G.numel()), reads=True,
        )  # fmt: skip


def jt_apply(settings: Settings) -> Iterator[Case]:
    for shape in [(32, 4000)] if settings.quick else SHAPES:
        J = gaussian(shape, torch.float32, settings)
        w = J[..., 0].double()
        yield Case(
            "jt_apply", label(shape), torch.float32,
            ours=lambda J=J, w=w: linalg.jt_apply(J, w),
            reference=lambda J=J, w=w: (J.mT @ w.float()[..., None])[..., 0],
            bytes=float(4 * J.numel()), reads=True,
            error=relative_error(lambda J=J, w=w: (J.double().mT @ w[..., None])[..., 0]),
        )  # fmt: skip


def spread(shape: tuple[int, ...], settings: Settings) -> Tensor:
    """Singular values near 1 to 1e-7."""
    x = gaussian(shape, torch.float64, settings) / shape[-1] ** 0.5
    scale = torch.logspace(0, -7, shape[-2], dtype=torch.float64, device=x.device)
    rotation = torch.linalg.qr(gaussian((shape[-2], shape[-2]), torch.float64, settings)).Q
    return (rotation @ (scale[:, None] * x)).float()


def torch_svd(J: Tensor, r: Tensor, rtol: float) -> Tensor:
    u, s, vh = torch.linalg.svd(J, full_matrices=False)
    inverse = torch.where(s > rtol * s[..., :1], 1 / s, 0)
    return (vh.mT @ (inverse[..., None] * (u.mT @ r.to(J.dtype)[..., None])))[..., 0]


def torch_lowrank(J: Tensor, r: Tensor, k: int) -> Tensor:
    u, s, v = torch.svd_lowrank(J, q=k, niter=2)
    return v @ ((u.mT @ r) / s)


def torch_lstsq(J: Tensor, r: Tensor) -> Tensor:
    return torch.linalg.lstsq(J, r[:, None], rcond=RTOL, driver="gelsd").solution[:, 0]


def pinv_apply(settings: Settings) -> Iterator[Case]:
    for shape in [(32, 4000)] if settings.quick else SHAPES:
        J = spread(shape, settings)
        r = torch.ones(shape[:-1], device=J.device)
        peers: dict[str, Callable[[], Tensor]] = {
            "pinv": lambda J=J, r=r: (torch.linalg.pinv(J, rtol=RTOL) @ r[..., None])[..., 0]
        }
        if J.dim() == 2 and J.device.type == "cpu":
            peers["lstsq gelsd"] = lambda J=J, r=r: torch_lstsq(J, r)
            peers["svd_lowrank, k = B/4"] = lambda J=J, r=r: torch_lowrank(J, r, J.shape[-2] // 4)
        yield Case(
            "pinv_apply", label(shape), torch.float32, variant="rtol 1e-3",
            ours=lambda J=J, r=r: linalg.pinv_apply(J, r, rtol=RTOL),
            reference=lambda J=J, r=r: torch_svd(J, r, RTOL), peers=peers,
            flops={torch.float64: float(J.numel() * J.shape[-2])}, bytes=float(8 * J.numel()), reads=True,
            error=relative_error(lambda J=J, r=r: torch_svd(J.double(), r, RTOL)),
        )  # fmt: skip
