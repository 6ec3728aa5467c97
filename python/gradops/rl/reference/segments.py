"""Segments of pruned trajectories, walked call by call."""
from itertools import pairwise

import torch
from torch import Tensor


def segment_trajectories(cu_seqlens: Tensor, trainable: Tensor, prunes: Tensor, removed_by: Tensor, *,
                         double_count: bool = False):
    tokens, mask, bounds, ids, offsets = [], [], [0], [], [0]
    history = cu_seqlens.tolist()
    for i, (begin, end) in enumerate(pairwise(history)):
        calls = [t for t in range(begin, end) if prunes[t]]
        previous = begin
        for k in range(len(calls) + 1):
            final = k == len(calls)
            stop = end if final else calls[k] + 1
            if final and stop == previous:
                continue
            for t in range(begin, stop):
                if 0 <= removed_by[t] < k:
                    continue
                tokens.append(t)
                mask.append(bool(trainable[t]) and (t >= previous or (final and double_count)))
            bounds.append(len(tokens))
            ids.append(i)
            previous = stop
        offsets.append(len(ids))
    return (torch.tensor(tokens, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool), torch.tensor(bounds),
            torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets))
