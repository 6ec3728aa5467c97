"""Cases of CAPO: per-token curvature and the moments' update."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import rl

from ..harness import Case, Settings

SHAPES = [((2048, 50, 1024), torch.float32), ((2048, 50, 1024), torch.bfloat16), ((512, 50, 4096), torch.bfloat16)]
ROWS = 8192  # of the vocabulary: tokens that occur


def tokens(n: int, k: int, h: int, dtype: torch.dtype, settings: Settings) -> tuple[list[Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(dtype)
    probs = (3 * torch.randn(n, k, generator=g)).softmax(-1)
    # Common tokens are in most supports: Zipf's law, without repetition in a support.
    frequent = -torch.arange(1, ROWS + 1).float().log() - torch.empty(n, ROWS).exponential_(generator=g).log()
    ids = frequent.topk(k).indices
    args = [hidden, probs, torch.randint(-1, k, (n,), generator=g), torch.randn(n, generator=g)]
    moments = {"token_ids": ids, "exp_avg": 0.1 * torch.randn(ROWS, h, generator=g),
               "exp_avg_sq": 0.1 * torch.rand(ROWS, h, generator=g)}
    return [x.to(settings.device) for x in args], {name: x.to(settings.device) for name, x in moments.items()}


def in_chunks(args: list[Tensor], moments: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The dense formulation, 256 tokens at a time, as its [N, K, H] tensors demand."""
    ids = moments.get("token_ids")
    parts = []
    for i in range(0, len(args[0]), 256):
        here = moments if ids is None else moments | {"token_ids": ids[i:i + 256]}
        parts.append(rl.reference.capo_curvature(*(x[i:i + 256] for x in args), **here, **options))  # type: ignore[arg-type]
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def worst(exact: Callable[[], list[Tensor]]) -> Callable[[Any], float]:
    """The largest of the results' relative errors (Frobenius) against float64."""
    known: list[Tensor] = []

    def error(got: Any) -> float:
        known[:] = known or exact()
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, known, strict=True))

    return error


def cases(settings: Settings) -> Iterator[Case]:
    for (n, k, h), dtype in SHAPES[:1] if settings.quick else SHAPES:
        args, moments = tokens(n, k, h, dtype, settings)
        wide = [x.double() if x.is_floating_point() else x for x in args]
        exact = {name: x.double() if x.is_floating_point() else x for name, x in moments.items()}
        plain = [args[0].float(), *args[1:]]
        size = float(args[0].nbytes + args[1].nbytes)
        label = f"{n}x{k}x{h}"
        yield Case(
            "capo_curvature", label, dtype, variant="sgd",
            ours=lambda a=args: rl.capo_curvature(*a),
            reference=lambda a=plain: in_chunks(a, {}),
            bytes=size, error=worst(lambda a=wide: in_chunks(a, {})),
        )  # fmt: skip
        # every row that occurs is read once; the gather is 2 n k h numbers out of the caches
        rows = moments["token_ids"].unique().numel()
        yield Case(
            "capo_curvature", label, dtype, variant="adam",
            ours=lambda a=args, m=moments: rl.capo_curvature(*a, model="adam", step=10, **m),
            reference=lambda a=plain, m=moments: in_chunks(a, m, model="adam", step=10),
            bytes=size + 8.0 * rows * h,
            error=worst(lambda a=wide, m=exact: in_chunks(a, m, model="adam", step=10)),
        )  # fmt: skip
        yield update(label, dtype, args, moments, rows)


def update(label: str, dtype: torch.dtype, args: list[Tensor], moments: dict[str, Tensor], rows: int) -> Case:
    mask = torch.rand(len(args[0]), generator=torch.Generator().manual_seed(1)).to(args[0].device) < 0.8
    rest = [*args, moments["token_ids"], mask]

    def call(f: Callable[..., None], work: torch.dtype) -> list[Tensor]:  # with a copy of the moments, for both alike
        m, s = moments["exp_avg"].to(work, copy=True), moments["exp_avg_sq"].to(work, copy=True)
        f(m, s, *(x.to(work) if work == torch.float64 and x.is_floating_point() else x for x in rest), reduction="sum")
        return [m, s]

    return Case(
        "capo_update_moments_", label, dtype,
        ours=lambda: call(rl.capo_update_moments_, torch.float32),
        reference=lambda: call(rl.reference.capo_update_moments_, torch.float32),
        bytes=float(args[0].nbytes + args[1].nbytes + 16 * rows * args[0].shape[1] + 4 * moments["exp_avg"].nbytes),
        error=worst(lambda: call(rl.reference.capo_update_moments_, torch.float64)),
    )  # fmt: skip
