"""Trajectories whose context was pruned on the way, cut into segments that a model can be trained on."""
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_device, check_integers, check_like, check_rising, check_tensor, may_look


class Segments(NamedTuple):
    """Packed segments: `history[tokens]` is what they hold, and `mask` says where it is trained."""

    tokens: Tensor  # (M,) int64: the token of the history at each place
    mask: Tensor  # (M,) bool: trained there
    cu_seqlens: Tensor  # (segments + 1,) int64
    trajectory_ids: Tensor  # (segments,) int64
    trajectory_offsets: Tensor  # (trajectories + 1,) int64: trajectory i has segments offsets[i]:offsets[i + 1]


def segment_trajectories(cu_seqlens: Tensor, trainable: Tensor, prunes: Tensor, removed_by: Tensor, *,
                         double_count: bool = False) -> Segments:
    r"""Cuts packed trajectories at their prune calls into the contexts that the model really saw.

    An agent that edits its memory sees, after each edit, a context that is no longer a prefix of the next one. A
    trajectory with edits ``0, 1, ..., m - 1`` becomes segments ``0, ..., m``: segment ``k`` holds, in order, the
    tokens up to and including call ``k`` (for ``k = m``: all) that no call before ``k`` removed. A last segment
    without new tokens is left out. Each trainable token is trained in the segment in which it was produced.

    Args:
        cu_seqlens: int32 or int64 ``(trajectories + 1,)``: trajectory ``i`` has tokens
            ``cu_seqlens[i]:cu_seqlens[i + 1]`` of the history, everything that was ever in its context, in the order in
            which it came.
        trainable: bool ``(N,)``: tokens the model produced (not prompts, not tool output).
        prunes: bool ``(N,)``: the last token of each prune call.
        removed_by: int32 or int64 ``(N,)``: the prune call of its trajectory, counted from 0, that removed the token;
            -1 if none did.
        double_count: also train the tokens from before the last prune call that the last segment still holds.

    Returns:
        :class:`Segments`. ``trajectory_ids`` and, for ``G`` trajectories per prompt, ``trajectory_offsets[::G]`` are
        what :func:`trajectory_advantages` takes.

    Raises:
        TypeError: a tensor has a wrong dtype or layout.
        ValueError: shapes or devices disagree, or, on the CPU, ``cu_seqlens`` does not rise from 0 to ``N``, or
            ``removed_by`` names a call that there is not, or one before the token came.

    DCPO (MemAct), arXiv 2510.12635. The authors' code trains as with ``double_count=True``; False, each token once, is
    our default. O(M log M) for M tokens of all segments. On CUDA the sizes of the results are fetched: it synchronizes.

    Example:
        >>> import torch
        >>> from gradops.rl import segment_trajectories
        >>> s = segment_trajectories(  # call 0 ends with token 2 and removes token 1
        ...     torch.tensor([0, 5]), torch.tensor([False, False, True, False, True]),
        ...     torch.tensor([False, False, True, False, False]), torch.tensor([-1, 0, -1, -1, -1]))
        >>> s.tokens, s.cu_seqlens
        (tensor([0, 1, 2, 0, 2, 3, 4]), tensor([0, 3, 7]))
        >>> s.tokens[s.mask]
        tensor([2, 4])
    """
    check_integers(cu_seqlens, "cu_seqlens")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (trajectories + 1,), got {tuple(cu_seqlens.shape)}")
    for name, x in (("trainable", trainable), ("prunes", prunes)):
        check_tensor(x, name)
        if x.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {x.dtype}")
    check_integers(removed_by, "removed_by")
    if trainable.dim() != 1:
        raise ValueError(f"trainable must have shape (N,), got {tuple(trainable.shape)}")
    check_like(prunes, "prunes", trainable, "trainable")
    check_like(removed_by, "removed_by", trainable, "trainable")
    check_device(cu_seqlens, "cu_seqlens", trainable, "trainable")
    n, bounds = trainable.shape[0], cu_seqlens.long()
    check_rising(bounds, "cu_seqlens", n)

    trajectory = torch.repeat_interleave(bounds.diff(), output_size=n)
    calls_before = torch.cat([bounds.new_zeros(1), prunes.cumsum(0)])  # before token t, in the whole pack
    calls = calls_before[bounds[1:]] - calls_before[bounds[:-1]]
    born = calls_before[:-1] - calls_before[bounds[:-1]][trajectory]  # the segment in which a token is produced
    removed = removed_by.long()
    wrong = (removed < -1) | (removed >= calls[trajectory]) | (removed >= 0) & (removed < born)
    if may_look(removed) and wrong.any():
        raise ValueError("removed_by must be -1 or a prune call of the token's trajectory that is not before the token")

    # A trajectory has one more segment than calls, unless a call was its last token.
    final = bounds[1:].clamp(min=1) - 1
    tail = (bounds.diff() > 0) & ~prunes[final] if n else bounds.diff() > 0
    segments = calls + tail
    offsets = torch.cat([bounds.new_zeros(1), segments.cumsum(0)])
    last = segments[trajectory] - 1
    until = torch.where(removed >= 0, torch.minimum(removed, last), last)

    repeats = until - born + 1  # a token lies in segments born, ..., until
    token = torch.repeat_interleave(repeats)
    places = torch.arange(token.shape[0], device=token.device)
    local = born[token] + places - (repeats.cumsum(0) - repeats)[token]
    segment = offsets[trajectory[token]] + local
    order = segment.argsort(stable=True)
    token, local, segment = token[order], local[order], segment[order]
    trained = local == born[token]
    if double_count:
        trained |= (local == last[token]) & tail[trajectory[token]]
    ids = torch.repeat_interleave(segments)
    lengths = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
    lengths = lengths.scatter_add(0, segment, torch.ones_like(segment))  # of integers: any order gives the same
    starts = torch.cat([bounds.new_zeros(1), lengths.cumsum(0)])
    return Segments(token, trainable[token] & trained, starts, ids, offsets)
