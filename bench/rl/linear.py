"""Cases of linear_logprob and one_token_rollout_loss; each is a forward and a backward pass."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import rl

from ..harness import Case, Settings

Result = tuple[Tensor, ...]  # the results, then the gradients
VOCABULARY = 131072


def cases(settings: Settings) -> Iterator[Case]:
    yield from linear_logprob(settings)
    yield from one_token_rollout(settings)


def with_gradients(f: Callable[..., Result], inputs: Result, upstream: Tensor) -> Callable[[], Result]:
    """f and the gradients of the sum over its results times `upstream`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run() -> Result:
        results = f(*leaves)
        loss = sum((y * u).sum() for y, u in zip(results, upstream, strict=False))
        return (*(y.detach() for y in results), *torch.autograd.grad(loss, leaves))

    return run


def worst(exact: Callable[[], Result]) -> Callable[[Result], float]:
    """The largest ||y - exact|| / ||exact|| of all results, in float64."""
    known: list[Result] = []

    def error(results: Result) -> float:
        if not known:
            known.append(exact())
        return max(float((y.double() - x).norm() / x.norm()) for y, x in zip(results, known[0], strict=True))

    return error


def torch_linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Result:
    logp = torch.nn.functional.linear(hidden, weight)
    logp = (logp if logp.dtype == torch.float64 else logp.float()).log_softmax(-1)
    at_target = logp.gather(-1, targets[:, None]).squeeze(-1)
    return (at_target, -(logp.exp() * logp).sum(-1)) if entropy else (at_target,)


def exact_linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, upstream: Tensor,
                         ) -> Callable[[], Result]:
    def exact() -> Result:
        h, w, up = hidden.double(), weight.double(), upstream.double()
        parts = [with_gradients(lambda h, w, t=targets[i:i + 64]: torch_linear_logprob(h, w, t, entropy),
                                (h[i:i + 64], w), up[:, i:i + 64])() for i in range(0, len(h), 64)]
        *rows, weights = zip(*parts, strict=True)
        return (*(torch.cat(r) for r in rows), sum(weights[1:], weights[0]))

    return exact


def peers_of_linear_logprob(targets: Tensor, entropy: bool, dtype: torch.dtype) -> dict[str, Callable[..., Result]]:
    found: dict[str, Callable[..., Result]] = {}
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as SIZE
        names = ("entropy",) if entropy else ()
        found["TRL"] = lambda h, w: ChunkedLogProbFunction.apply(
            h, w, None, targets, 1.0, SIZE, None, 1.0, names)[:1 + entropy]
    except ImportError:
        pass
    # In bfloat16 one call of it takes two minutes on a CPU, four times what it takes in float32.
    if not entropy and dtype == torch.float32 and hasattr(torch.nn.functional, "linear_cross_entropy"):
        def chunked(h: Tensor, w: Tensor) -> Result:
            return -torch.nn.functional.linear_cross_entropy(
                h, w, targets, reduction="none", options=torch.nn.LinearCrossEntropyOptions()),

        found["F.linear_cross_entropy"] = chunked
    return found


def linear_logprob(settings: Settings) -> Iterator[Case]:
    tall, *others = [(1024, 256), (256, 1024), (512, 1024)] if settings.device == "cpu" else [(8192, 4096)]
    grid = [*((torch.float32, shape, "") for shape in (tall, *others[:1])), (torch.bfloat16, tall, "entropy"),
            *((torch.bfloat16, shape, "") for shape in (tall, *others))]
    for dtype, (rows, h), variant in grid:
        if settings.quick:
            rows, h = min(rows, 64), min(h, 64)
        v, entropy = VOCABULARY // (8 if settings.quick else 1), variant == "entropy"
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, h, generator=g).to(settings.device, dtype)
        weight = (2 / h**0.5 * torch.randn(v, h, generator=g)).to(settings.device, dtype)
        targets = torch.randint(0, v, (rows,), generator=g).to(settings.device)
        upstream = torch.randn(2, rows, generator=g).to(settings.device)

        def ours(h: Tensor, w: Tensor, t: Tensor = targets, e: bool = entropy) -> Result:
            y = rl.linear_logprob(h, w, t, return_=("logp", "entropy") if e else ("logp",))
            return y if isinstance(y, tuple) else (y,)

        def theirs(h: Tensor, w: Tensor, t: Tensor = targets, e: bool = entropy) -> Result:
            return torch_linear_logprob(h, w, t, e)

        exact = worst(exact_linear_logprob(hidden, weight, targets, entropy, upstream))
        yield Case(
            "linear_logprob", f"{rows}x{h}x{v}", dtype, variant=variant,
            ours=with_gradients(ours, (hidden, weight), upstream),
            reference=with_gradients(theirs, (hidden, weight), upstream),
            peers={name: with_gradients(f, (hidden, weight), upstream)
                   for name, f in peers_of_linear_logprob(targets, entropy, dtype).items()},
            flops={dtype: 6.0 * rows * h * v},  # with the logits kept; without, 8
            error=exact if h <= 256 or not hidden.is_cpu else None,  # a product in float64 takes longest of all
        )  # fmt: skip


def torch_one_token_rollout(logits: Tensor, targets: Tensor, k: int | None) -> Result:
    """At temperature 1.5 and beta -0.1, by autograd."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    logp, q = z.log_softmax(-1), (z.detach() / 1.5).softmax(-1)
    if k is None:
        x = targets[:, None]
        return -(1.1 * q.gather(-1, x) * logp.gather(-1, x)).squeeze(-1) + 0.1 * (q * logp).sum(-1),
    samples = torch.multinomial(q, k, replacement=True)
    reward = torch.where(samples == targets[:, None], 1.0, -0.1)
    return -(reward * logp.gather(-1, samples)).mean(-1),


def one_token_rollout(settings: Settings) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows, v in [(32, 4096)] if settings.quick else [(512, 32768), (256, 131072)]:
            for k in (None, 256):
                g = torch.Generator().manual_seed(0)
                logits = (3 * torch.randn(rows, v, generator=g)).to(settings.device, dtype)
                targets = torch.randint(0, v, (rows,), generator=g).to(settings.device)
                upstream = torch.ones(1, rows, device=settings.device)
                seeds = None if k is None else torch.arange(rows, device=settings.device)

                def ours(z: Tensor, t: Tensor = targets, k: int | None = k, s: Tensor | None = seeds) -> Result:
                    return rl.one_token_rollout_loss(z, t, temperature=1.5, beta=-0.1, k=k, seeds=s, reduction="none"),

                def theirs(z: Tensor, t: Tensor = targets, k: int | None = k) -> Result:
                    return torch_one_token_rollout(z, t, k)

                exact: dict[str, Any] = {} if k else {
                    "error": worst(with_gradients(theirs, (logits.double(),), upstream.double()))}
                yield Case(
                    "one_token_rollout_loss", f"{rows}x{v}", dtype, variant=f"k={k}" if k else "exact",
                    ours=with_gradients(ours, (logits,), upstream),
                    reference=with_gradients(theirs, (logits,), upstream),
                    bytes=3.0 * logits.numel() * logits.element_size(),  # read twice, write the gradient
                    **exact,
                )  # fmt: skip
