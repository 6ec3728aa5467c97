"""Results of a softmax whose entries are cut over the ranks of a process group."""
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def merge_shards(results: Sequence[Tensor], targets: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
    """Of all entries, from each rank's (logp, lse, entropy, sum_p2, sum_p3) in float64; in the order of ranks, so
    that all ranks get the same bits. Targets: -1 where another rank holds the entry, whose logp is then 0."""
    logp, lse, entropy, p2, p3 = results
    mine = targets >= 0
    at_target = torch.where(mine, logp + lse[:, None], 0.0)
    sent = torch.cat([at_target, mine.double(), lse[:, None],
                      *(x.reshape(len(x), -1) for x in (entropy, p2, p3))], 1)
    received = [torch.empty_like(sent) for _ in range(group.size())]
    torch.distributed.all_gather(received, sent, group=group)
    k = targets.shape[1]
    z, owners, lses, rest = torch.stack(received).split([k, k, 1, sent.shape[1] - 2 * k - 1], -1)
    owners = owners.sum(0)
    if owners.is_cpu and (owners != 1).any():
        raise ValueError("targets must each lie in the part of the vocabulary of exactly one rank")
    total = lses.logsumexp(0)
    share = (lses - total).exp()
    absent = torch.where(owners == 1, 0.0, torch.nan)  # on CUDA, where nobody has looked
    logp = (z.sum(0) - total + absent).clamp_max(0)
    h, p2, p3 = rest.split([x.numel() // max(len(x), 1) for x in (entropy, p2, p3)], -1)
    log_share = torch.where(share == 0, 0.0, lses - total)
    return (logp, total[:, 0], *(x.sum(0).reshape(y.shape) for x, y in (
        (share * (h - log_share), entropy), (share**2 * p2, results[3]), (share**3 * p3, results[4]))))
