"""Cases of rankings: permutation weights and the Plackett-Luce model."""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradops import rl

from ..harness import Case, Settings, relative_error


def cases(settings: Settings) -> Iterator[Case]:
    yield from permutation_weights(settings)
    yield from plackett_luce(settings)


def torch_weights(logp: Tensor, ids: Tensor, lengths: Tensor, group_size: int) -> Tensor:
    means = torch.zeros(len(lengths), dtype=logp.dtype, device=logp.device).index_add_(0, ids, logp) / lengths
    return means.reshape(-1, group_size).softmax(-1).flatten()


def permutation_weights(settings: Settings) -> Iterator[Case]:
    for groups, size, longest in [(256, 16, 64), (64, 16, 1024)]:
        g = torch.Generator().manual_seed(0)
        lengths = torch.randint(longest // 4, longest, (groups * size,), generator=g).to(settings.device)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        ids = torch.arange(groups * size, device=settings.device).repeat_interleave(lengths)
        logp = -torch.rand(len(ids), generator=g).to(settings.device)
        yield Case(
            "permutation_weights", f"{groups}x{size}x{longest}", torch.float32,
            ours=lambda x=logp, c=cu_seqlens, s=size: rl.permutation_weights(x, c, group_size=s),
            reference=lambda x=logp, i=ids, n=lengths, s=size: torch_weights(x, i, n, s),
            bytes=float(logp.nbytes),
            error=relative_error(lambda x=logp, i=ids, n=lengths, s=size: torch_weights(x.double(), i, n, s)),
        )  # fmt: skip


def torch_logprob(scores: Tensor, permutation: Tensor) -> Tensor:
    """As one writes it: order the scores, the ranked first, and take logcumsumexp from the end."""
    k = permutation.shape[-1]
    left = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, permutation, False)
    rest = scores.masked_fill(~left, -torch.inf).logsumexp(-1, keepdim=True)
    chosen = scores.gather(-1, permutation)
    total = torch.cat([rest, chosen.flip(-1)], -1).logcumsumexp(-1)[..., 1:].flip(-1)
    return (chosen - total)[..., :k].sum(-1)


def with_gradient(f: Callable[[Tensor, Tensor], Tensor], scores: Tensor, permutation: Tensor) -> Tensor:
    scores = scores.detach().requires_grad_()
    grad, = torch.autograd.grad(f(scores, permutation).sum(), scores)
    return grad


def plackett_luce(settings: Settings) -> Iterator[Case]:
    shapes = [(4096, 20, 5), (1024, 100, 100), (16, 10000, 10000)]
    for rows, n, k in shapes[:1] if settings.quick else shapes:
        g = torch.Generator().manual_seed(0)
        scores = (2 * torch.randn(rows, n, generator=g)).to(settings.device)
        permutation = torch.rand(rows, n, generator=g).argsort(-1)[:, :k].contiguous().to(settings.device)
        label = f"{rows}x{n}x{k}"
        yield Case(
            "plackett_luce_logprob", label, torch.float32,
            ours=lambda s=scores, p=permutation: rl.plackett_luce_logprob(s, p),
            reference=lambda s=scores, p=permutation: torch_logprob(s, p),
            bytes=float(scores.nbytes + permutation.nbytes),
            error=relative_error(lambda s=scores, p=permutation: torch_logprob(s.double(), p)),
        )  # fmt: skip
        yield Case(
            "plackett_luce_logprob", label, torch.float32, variant="forward+backward",
            ours=lambda s=scores, p=permutation: with_gradient(rl.plackett_luce_logprob, s, p),
            reference=lambda s=scores, p=permutation: with_gradient(torch_logprob, s, p),
            bytes=float(2 * scores.nbytes + permutation.nbytes),
            error=relative_error(lambda s=scores, p=permutation: with_gradient(torch_logprob, s.double(), p)),
        )  # fmt: skip
        yield Case(
            "plackett_luce_sample", label, torch.float32,
            ours=lambda s=scores, k=k: rl.plackett_luce_sample(s, k),
            reference=lambda s=scores, k=k: torch.multinomial(s.softmax(-1), k),  # the same distribution
            bytes=float(scores.nbytes + 8 * rows * k),
        )  # fmt: skip
