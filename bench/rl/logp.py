"""Log-probabilities from logits."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import rl

from ..harness import Case, Settings

BOTH = ("logp", "entropy")
SHAPES = [(2048, 32_768), (512, 131_072)]


def cases(settings: Settings) -> Iterator[Case]:
    yield from selective_log_softmax(settings)
    yield from selective_log_softmax_backward(settings)
    yield from top_p_keep(settings)


def data(shape: tuple[int, int], dtype: torch.dtype, settings: Settings) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(shape, generator=generator)
    index = torch.randint(shape[1], shape[:1], generator=generator)
    return logits.to(settings.device, dtype), index.to(settings.device)


def grid(settings: Settings) -> Iterator[tuple[tuple[int, int], torch.dtype]]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows, vocabulary in [(64, 32_768)] if settings.quick else SHAPES:
            yield (rows, vocabulary), dtype


def torch_logp(x: Tensor, index: Tensor) -> Tensor:
    return torch.log_softmax(x.float(), -1).gather(-1, index[:, None]).squeeze(-1)


def torch_logp_and_entropy(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(x.float(), -1)
    return logp.gather(-1, index[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def trl_logp(x: Tensor, index: Tensor) -> Callable[[], Any] | None:
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError:
        return None
    return lambda: selective_log_softmax(x, index)


def verl_functions() -> Any:
    try:
        from verl.utils import torch_functional
    except ImportError:
        return None
    return torch_functional


def present(peers: dict[str, Callable[[], Any] | None]) -> dict[str, Callable[[], Any]]:
    return {name: f for name, f in peers.items() if f is not None}


def largest_error(exact: Callable[[], tuple[Tensor, ...]]) -> Callable[[Any], float]:
    """The largest absolute error in any of the results, in nats."""
    known: list[tuple[Tensor, ...]] = []

    def error(results: Any) -> float:
        if not known:
            known.append(exact())
        results = (results,) if isinstance(results, Tensor) else results
        return max(float((y.double() - t).abs().max()) for y, t in zip(results, known[0], strict=True))

    return error


def exact_rows(x: Tensor, index: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The reference in float64, a few rows at a time."""
    parts = []
    for rows, at in zip(x.split(16), index.split(16), strict=True):
        out = rl.reference.selective_log_softmax(rows.double(), at, return_=names, out_dtype=torch.float64)
        parts.append(out if isinstance(out, tuple) else (out,))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def selective_log_softmax(settings: Settings) -> Iterator[Case]:
    verl = verl_functions()
    for shape, dtype in grid(settings):
        x, index = data(shape, dtype, settings)
        name = "x".join(map(str, shape))
        size = float(x.numel() * x.element_size())
        yield Case(
            "selective_log_softmax", name, dtype, variant="logp",
            ours=lambda x=x, i=index: rl.selective_log_softmax(x, i), reference=lambda x=x, i=index: torch_logp(x, i),
            peers=present({
                "TRL": trl_logp(x, index),
                "verl": verl and (lambda x=x, i=index: verl.logprobs_from_logits_v2(x, i)),
                "F.cross_entropy": lambda x=x, i=index: -torch.nn.functional.cross_entropy(x, i, reduction="none"),
            }),
            bytes=size, reads=True, error=largest_error(lambda x=x, i=index: exact_rows(x, i, ("logp",))),
        )  # fmt: skip
        yield Case(
            "selective_log_softmax", name, dtype, variant="logp, entropy",
            ours=lambda x=x, i=index: rl.selective_log_softmax(x, i, return_=BOTH),
            reference=lambda x=x, i=index: torch_logp_and_entropy(x, i),
            peers=present({"verl": verl and (lambda x=x, i=index: (verl.logprobs_from_logits_v2(x, i),
                                                                   verl.entropy_from_logits(x)))}),
            bytes=size, reads=True, error=largest_error(lambda x=x, i=index: exact_rows(x, i, BOTH)),
        )  # fmt: skip


def selective_log_softmax_backward(settings: Settings) -> Iterator[Case]:
    """The gradient alone, of a graph that is kept. The floor is a copy into an array in use; `clone()` is one into
    fresh memory, as a function that returns a tensor has it. Ours takes the memory of the gradient freed before."""
    for shape, dtype in grid(settings):
        x, index = data(shape, dtype, settings)
        x.requires_grad_()
        name = "x".join(map(str, shape))
        for both in (False, True):
            graph = torch_logp_and_entropy(x, index) if both else (torch_logp(x, index),)
            names = BOTH if both else BOTH[:1]
            out = rl.selective_log_softmax(x, index, return_=names)
            ours = sum(t.sum() for t in (out if both else (out,)))
            theirs = sum(t.sum() for t in graph)
            yield Case(
                "selective_log_softmax backward", name, dtype, variant=", ".join(names),
                ours=lambda y=ours, x=x: torch.autograd.grad(y, x, retain_graph=True),
                reference=lambda y=theirs, x=x: torch.autograd.grad(y, x, retain_graph=True),
                peers={"logits.clone()": lambda x=x: x.detach().clone()},
                bytes=2.0 * x.numel() * x.element_size(),
            )  # fmt: skip


def top_p_keep(settings: Settings) -> Iterator[Case]:
    for shape in [(16, 32_768)] if settings.quick else [(256, 32_768), (64, 131_072)]:
        x, _ = data(shape, torch.float32, settings)
        yield Case(
            "top_p_keep", "x".join(map(str, shape)), torch.float32,
            ours=lambda x=x: rl.top_p_keep(x, 0.9), reference=lambda x=x: rl.reference.top_p_keep(x, 0.9),
            bytes=float(x.numel() * x.element_size()), reads=True,
        )  # fmt: skip
