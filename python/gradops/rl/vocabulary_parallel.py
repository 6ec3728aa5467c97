"""Results of a softmax whose entries come in parts: one after the other, or cut over the ranks of a process group."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def merge_parts(results: Sequence[Tensor], mine: Tensor) -> tuple[Tensor, ...]:
    """Of all entries, from each part's (logp, lse, entropy, sum_p2, sum_p3) in float64, with the parts in front.
    mine: the targets whose entries a part holds; a target that no part holds has logp = 0."""
    logp, lse, entropy, p2, p3 = results
    total = lse.logsumexp(0)
    log_share = lse - total
    share = log_share.exp()
    # A part of masked entries only has NaN for whatever is relative to its lse.
    logp = torch.where(lse == -torch.inf, 0.0, logp.movedim(-1, 0)).movedim(0, -1) + log_share[..., None]

    def total_of(x: Tensor, terms: Callable[[Tensor], Tensor]) -> Tensor:
        if x.dim() > lse.dim():  # not wanted
            return x[0]
        return torch.where(share == 0, 0.0, terms(x)).sum(0)

    return (torch.where(mine, logp, 0.0).sum(0).clamp_max(0), total,
            total_of(entropy, lambda x: share * (x - log_share)), total_of(p2, lambda x: share**2 * x),
            total_of(p3, lambda x: share**3 * x))


def merge_shards(results: Sequence[Tensor], targets: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
    """The same of each rank's results, in the order of ranks, so that all ranks get the same bits. Targets: -1 where
    another rank holds the entry."""
    logp, lse, *rest = results
    sent = torch.cat([logp, (targets >= 0).double(), lse[:, None], *(x.reshape(len(x), -1) for x in rest)], 1)
    received = [torch.empty_like(sent) for _ in range(group.size())]
    torch.distributed.all_gather(received, sent, group=group)
    k = targets.shape[1]
    sizes = (k, k, 1, *(x.numel() // max(len(x), 1) for x in rest))
    logps, mine, lses, *rests = torch.stack(received).split(sizes, -1)
    owners = mine.sum(0)
    if owners.is_cpu and (owners != 1).any():
        raise ValueError("targets must each lie in the part of the vocabulary of exactly one rank")
    rests = [x.reshape(len(x), *y.shape) for x, y in zip(rests, rest, strict=True)]
    merged = merge_parts([logps, lses[..., 0], *rests], mine > 0)
    return torch.where(owners == 1, merged[0], torch.nan), *merged[1:]  # on CUDA, where nobody has looked
