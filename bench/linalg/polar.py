"""Cases of gradops.linalg: polar decomposition and its relatives."""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz  # the loop that torch.optim.Muon runs

from gradops import linalg

from ..harness import Case, Settings, relative_error

SIMPLE = (3.4445, -4.7750, 2.0315)
SHAPES = [(64, 32, 32), (64, 64, 64), (32, 128, 128), (16, 256, 256), (8, 128, 1024), (4, 256, 1024), (1024, 1024)]
ROWS = [(32000, 512), (4096, 4096)]


def cases(settings: Settings) -> Iterator[Case]:
    yield from newton_schulz(settings)
    yield from polar(settings)
    yield from inv_sqrt(settings)
    yield from one_sided_polar(settings)
    yield from row_norm(settings)
    yield from nuclear_scale(settings)


def label(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def gaussian(shape: tuple[int, ...], dtype: torch.dtype, settings: Settings) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(settings.device, dtype)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Batch, short side, long side."""
    short, long = sorted(x.shape[-2:])
    return x[..., 0, 0].numel(), short, long


def _bytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def torch_newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """The iteration as one writes it in plain torch for a batch: every product in x's dtype."""
    a, b, c = SIMPLE
    y = x.reshape(-1, *x.shape[-2:])
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


def _muon_loop(x: Tensor) -> Tensor:
    return torch.stack([_zeropower_via_newtonschulz(m, SIMPLE, 5, 1e-7) for m in x.reshape(-1, *x.shape[-2:])])


def newton_schulz(settings: Settings) -> Iterator[Case]:
    kinds: list[tuple[torch.dtype, str | None]] = [
        (torch.bfloat16, None), (torch.float32, "highest"), (torch.float32, "high"), (torch.float64, None),
        (torch.float16, None),
    ]  # fmt: skip
    shapes = SHAPES[:2] + SHAPES[3:4] if settings.quick else SHAPES
    for dtype, precision in kinds[:2] if settings.quick else kinds:
        for shape in shapes:
            if dtype == torch.float16 and settings.device == "cpu" and shape == (1024, 1024):
                continue  # torch's own product takes seconds there
            x = gaussian(shape, dtype, settings)
            batch, short, long = _sizes(x)
            # Gram and its square are symmetric: half of each product is enough.
            work = float(batch * 5 * (3 * short * short * long + short**3))
            flops = {dtype: work}
            if precision == "high":
                flops[torch.bfloat16] = 3 * work
            yield Case(
                "newton_schulz", label(shape), dtype, variant=precision or "",
                ours=lambda x=x, p=precision: linalg.newton_schulz(x, 5, coefficients="simple", eps=0.0, precision=p),
                reference=lambda x=x: torch_newton_schulz(x),
                peers={"Muon loop": lambda x=x: _muon_loop(x)} if dtype == torch.bfloat16 else {},
                flops=flops, bytes=2 * _bytes(x),
                error=relative_error(lambda x=x: torch_newton_schulz(x.double())),
            )  # fmt: skip


def torch_polar(a: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook way: A = W S Vh, U = W Vh, H = V S Vh."""
    w, s, vh = torch.linalg.svd(a, full_matrices=False)
    return w @ vh, vh.mT @ (s[..., :, None] * vh)


def scipy_polar(a: Tensor) -> Callable[[], list[Tensor]] | None:
    try:
        from scipy.linalg import polar
    except ModuleNotFoundError:
        return None
    matrices = list(a.reshape(-1, *a.shape[-2:]).cpu().numpy())
    return lambda: [torch.stack([torch.from_numpy(f) for f in fs]) for fs in zip(*map(polar, matrices), strict=True)]


def polar_error(a: Tensor) -> Callable[[tuple[Tensor, Tensor]], float]:
    """The larger of ||U'U - I|| / sqrt(n) (or of UU' where A is wide) and ||A - UH|| / ||A||, in float64."""

    def error(result: tuple[Tensor, Tensor]) -> float:
        u, h = (f.double().reshape(-1, *f.shape[-2:]).to(a.device) for f in result)
        gram = u.mT @ u if u.shape[-2] >= u.shape[-1] else u @ u.mT
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        exact = a.double().reshape(u.shape)
        orthogonal = (gram - eye).norm(dim=(-2, -1)).max() / gram.shape[-1] ** 0.5
        backward = ((exact - u @ h).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).max()
        return float(torch.maximum(orthogonal, backward))

    return error


def polar(settings: Settings) -> Iterator[Case]:
    shapes = SHAPES[1:2] if settings.quick else SHAPES
    for dtype in (torch.float32, torch.float64):
        for shape in shapes:
            a = gaussian(shape, dtype, settings)
            batch, short, long = _sizes(a)
            theirs = scipy_polar(a) if settings.device == "cpu" else None
            yield Case(
                "polar", label(shape), dtype,
                ours=lambda a=a: linalg.polar(a),
                reference=lambda a=a: torch_polar(a),
                peers={"scipy": theirs} if theirs else {},
                flops={dtype: float(batch * 2 * short * short * long)},  # a Gram matrix and H, both symmetric
                bytes=2 * _bytes(a), error=polar_error(a),
            )  # fmt: skip


def torch_inv_sqrt(a: Tensor) -> Tensor:
    values, q = torch.linalg.eigh(a)
    return (q * values.rsqrt()[..., None, :]) @ q.mT


def inv_sqrt_error(a: Tensor) -> Callable[[Tensor], float]:
    """||X A X - I|| / sqrt(n) in float64, the worst of the batch."""
    eye = torch.eye(a.shape[-1], dtype=torch.float64, device=a.device)

    def error(x: Tensor) -> float:
        residual = x.double() @ a.double() @ x.double() - eye
        return float(residual.norm(dim=(-2, -1)).max()) / a.shape[-1] ** 0.5

    return error


def inv_sqrt(settings: Settings) -> Iterator[Case]:
    shapes = [(64, 64, 64)] if settings.quick else [(64, 32, 32), (64, 64, 64), (32, 128, 128), (16, 256, 256)]
    for dtype in (torch.float32, torch.float64):
        for shape in shapes:
            x = gaussian((*shape[:-1], 4 * shape[-1]), torch.float64, settings)
            a = ((x @ x.mT) / x.shape[-1]).to(dtype)  # condition number about 9
            yield Case(
                "inv_sqrt", label(shape), dtype,
                ours=lambda a=a: linalg.inv_sqrt(a), reference=lambda a=a: torch_inv_sqrt(a),
                flops={dtype: float(a.numel() * a.shape[-1])}, bytes=2 * _bytes(a),
                error=inv_sqrt_error(a),
            )  # fmt: skip


def torch_one_sided_polar(x: Tensor) -> Tensor:
    """U <X, U> with U = X (X'X)^(-1/2), by the eigenvectors of the Gram matrix."""
    u = x @ torch_inv_sqrt(x.mT @ x)
    return u * (x * u).sum((-2, -1), keepdim=True)


def one_sided_polar(settings: Settings) -> Iterator[Case]:
    for shape in [(8, 1024, 128)] if settings.quick else [(64, 128, 32), (8, 1024, 128), (4, 1024, 256)]:
        x = gaussian(shape, torch.float32, settings)
        batch, short, long = _sizes(x)
        yield Case(
            "one_sided_polar", label(shape), torch.float32,
            ours=lambda x=x: linalg.one_sided_polar(x), reference=lambda x=x: torch_one_sided_polar(x),
            flops={torch.float32: float(batch * 3 * short * short * long)}, bytes=2 * _bytes(x),
            error=relative_error(lambda x=x: torch_one_sided_polar(x.double())),
        )  # fmt: skip


def torch_row_norm(x: Tensor, center: bool) -> Tensor:
    x = x - x.mean(-2, keepdim=True) if center else x
    x = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
    return x - x.mean(-2, keepdim=True) if center else x


def row_norm(settings: Settings) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ROWS[:1] if settings.quick else ROWS:
            for center in (False, True):
                x = gaussian(shape, dtype, settings)
                yield Case(
                    "row_norm", label(shape), dtype, variant="center" if center else "",
                    ours=lambda x=x, c=center: linalg.row_norm(x, center=c),
                    reference=lambda x=x, c=center: torch_row_norm(x, c),
                    bytes=2 * _bytes(x),
                    error=relative_error(lambda x=x, c=center: torch_row_norm(x.double(), c)),
                )  # fmt: skip


def nuclear_scale(settings: Settings) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in [(16, 256, 256)] if settings.quick else [(64, 64, 64), (16, 256, 256), (4096, 4096)]:
            m = gaussian(shape, dtype, settings)
            u = m / m.norm(dim=(-2, -1), keepdim=True)  # stands for the polar factor, which takes minutes
            yield Case(
                "nuclear_scale", label(shape), dtype,
                ours=lambda m=m, u=u: linalg.nuclear_scale(m, u),
                reference=lambda m=m, u=u: (m * u).sum((-2, -1)),
                bytes=_bytes(m, u),
                error=relative_error(lambda m=m, u=u: (m.double() * u.double()).sum((-2, -1))),
            )  # fmt: skip
