"""The walk through the blocks of columns: what the columns before a block leave for it, and the kernel of the block.

With U, a block takes what the errors E before it leave: W_J -= E_< U_<J. With R = U^-1, one triangular inversion of N^3
less, the sum of all corrections X = E U of the columns before it says the same:

    S = X_< R_<J,   W_J += S U_JJ,   X_J = (E_J - S) U_JJ,   U_JJ = R_JJ^-1

and without FOEM's pull X_J is the given W_J less the rounded one.

GPTAQ adds W P, with P = M U and M strictly upper triangular, for the W that were rounded: it takes E - W M for E. What
the columns before a block have of it counts in S, and only the block's own P_JJ = M_JJ U_JJ is ever formed.
"""
from typing import Any

import torch
from torch import Tensor

from .._op import _library, register
from .._precision import matmul_precision
from ._columns import blocks, fresh_like, groups_known_until, items_together, may_hold
from .gptq_block import gptq_block, gptq_block_
from .gptq_spread import gptq_spread_
from .upper_factor import upper_factor

_library.define(
    "gptq_columns(Tensor w, Tensor unseen, Tensor factor, bool inverse, Tensor? drift, Tensor? scale, Tensor? zero, "
    "Tensor? group, Tensor? unit, int group_size, int block_size, bool fresh, int bits, bool symmetric, "
    "bool one_sided, float mse, int grid, int scale_type, float beta, bool pull_first, bool latent_rounded) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)  # fmt: skip


@torch.library.impl(_library, "gptq_columns", "CompositeExplicitAutograd")
def _gptq_columns(w: Tensor, unseen: Tensor, factor: Tensor, inverse: bool, drift: Tensor | None, scale: Tensor | None,
                  zero: Tensor | None, group: Tensor | None, unit: Tensor | None, group_size: int, block_size: int,
                  fresh: bool, *options: Any) -> tuple[Tensor, ...]:
    lead = w.shape[:-2]

    def three(x: Tensor | None, keep: int = 2) -> Any:
        return None if x is None else x.reshape(lead.numel(), *x.shape[x.dim() - keep :])

    empty = three(unseen, 1)
    w = three(w).masked_fill(empty[:, None], 0.0) if may_hold(empty) else three(w)
    tensors = (w, three(factor), three(drift), three(scale), three(zero), three(group, 1), three(unit, 0))
    walk = blocks(w.shape[-1], group_size, block_size, fresh and scale is None)
    # Not in huge pages like the workspaces: a machine that has to find hundreds of them anew may take half a second.
    out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    results = [torch.empty_like(out, dtype=torch.uint8), out, out.new_empty(out.shape[:2])]
    found = out.new_empty((*out.shape[:2], 0 if scale is not None else -(-w.shape[-1] // group_size)))
    results += [found, torch.empty_like(found)]
    step = items_together(tensors[1])
    with matmul_precision("highest"):  # no TensorFloat-32 or bfloat16 behind the name of float32
        for first in range(0, len(out), step):
            some = slice(first, first + step)
            _walk([None if x is None else x[some] for x in tensors], inverse, group_size, fresh, walk, options,
                  [x[some] for x in results])  # fmt: skip
    if may_hold(bad := ~results[2].isfinite()):  # the loss
        out.masked_fill_(bad[..., None], torch.nan)
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in results)


def _walk(tensors: Any, inverse: bool, group_size: int, fresh: bool, walk: list[tuple[int, int]], options: tuple,
          results: list[Tensor]) -> None:
    grid, beta, latent_rounded = options[:6], options[6], options[8]  # options[7]: pull_first
    original, factor, drift, scale, zero, group, unit = tensors
    codes, q, loss, scales, zeros = results
    loss.zero_()
    n = original.shape[-1]
    before = fresh_like(original)  # of the columns done: E (less W M), or X
    lost = torch.empty_like(loss)
    from_e = not inverse and (beta != 0 or (latent_rounded and drift is not None))  # what X is made from
    wide = max((end - begin for begin, end in walk), default=0)
    room = [original.new_empty(*original.shape[:2], wide) for _ in range(3)]
    latents = None if drift is None else fresh_like(before)
    # Up to column `ready`, w holds what the columns before `since` leave; from there on, nothing. With M, `ready` stays
    # 0: what is left changes with the columns that it is left for.
    w, ready, since = original, 0, 0

    def leave(target: Tensor, columns: slice, from_: int, to: int, **how: Any) -> None:
        """What columns from_ to `to` leave for these."""
        gptq_spread_(target, before[:, :, from_:to], factor[:, from_:to, columns], **how)

    def drifted(begin: int, columns: slice) -> Tensor | None:
        """W M of the columns before `begin`."""
        if latents is None or drift is None:
            return None
        out = latents.new_empty(len(latents), latents.shape[1], columns.stop - columns.start)
        gptq_spread_(out, latents[:, :, :begin], drift[:, :begin, columns], add=True, fresh=True)
        return out

    for begin, end in walk:
        here = slice(begin, end)
        until = end if scale is not None else groups_known_until(begin, end, n, group_size, fresh)
        # A group that begins here and goes on after the block, or the end of one that ends in it. (With R there is only
        # the first block's, before anything is left.)
        if inverse and (until > max(ready, end) or begin < ready < end):
            if begin > 0:
                w = fresh_like(w).copy_(w) if w is original else w
                if drift is not None:
                    w[:, :, begin:until] = original[:, :, begin:until]
                for part, from_ in ((slice(begin, ready), since), (slice(max(begin, ready), until), 0)):
                    if part.start < part.stop:
                        leave(w[:, :, part], part, from_, begin)
                if (more := drifted(begin, ahead := slice(begin, until))) is not None:
                    gptq_spread_(w[:, :, ahead], more, factor[:, ahead, ahead], add=True)
            if drift is None:
                ready, since = until, begin
        current = (w if drift is None else original)[:, :, here]
        u = factor[:, here, here] if inverse else upper_factor(factor[:, here, here], factored=True)[1]
        share = None
        if begin > 0:  # summed before it meets w: less is lost
            given, current, share = current, room[0][:, :, : end - begin], drifted(begin, here)
            if inverse:
                leave(current, here, since if end <= ready else 0, begin, fresh=True,
                      base=given if share is None else None)  # fmt: skip
            else:
                fresh_share = share is None
                share = room[1][:, :, : end - begin] if share is None else share
                gptq_spread_(share, before[:, :, :begin], factor[:, :begin, here], add=True, fresh=fresh_share)
            if share is not None:
                gptq_spread_(current, share, u, add=True, fresh=not inverse, base=given)
        pull = None
        if drift is not None:
            pull = torch.empty_like(u, memory_format=torch.contiguous_format)
            gptq_spread_(pull, drift[:, here, here], u, add=True, fresh=True)
        known: tuple[Tensor | None, ...] = (None, None, None)
        first, last = -(-begin // group_size), -(-end // group_size)  # groups that begin here
        if scale is not None and zero is not None and group is not None:
            known = (scale, zero, group[:, here])
        elif not fresh or group_size > end - begin:
            if first < last:
                from_, to = first * group_size, min(last * group_size, n)
                columns = w[:, :, from_:to] if to > end else current[:, :, from_ - begin : to - begin]
                scales[:, :, first:last], zeros[:, :, first:last] = gptq_block(
                    columns, *(None,) * 6, unit, group_size, *grid, 0.0, False, False)[4:6]
            low = begin // group_size
            places = torch.arange(begin, end, device=w.device) // group_size - low
            known = (scales[:, :, low:last], zeros[:, :, low:last], places.expand(len(w), end - begin))
        left = before[:, :, here]
        e = None if end == n or not (inverse or from_e) else left if inverse else room[2][:, :, : end - begin]
        latent = None if latents is None else latents[:, :, here]
        found = (None, None) if known[0] is not None else (scales[:, :, first:last], zeros[:, :, first:last])
        gptq_block_(codes[:, :, here], q[:, :, here], e, latent, *found, lost, current, u,
                    original[:, :, here] if beta != 0 else None, pull, *known, unit, group_size, *options)  # fmt: skip
        loss += lost
        if end == n:
            continue
        if e is None:
            torch.sub(original[:, :, here], q[:, :, here], out=left)
            continue
        if share is not None:
            e -= share
        if latent is not None and drift is not None:
            gptq_spread_(e, latent, drift[:, here, here])
        if not inverse:
            gptq_spread_(left, e, u, add=True, fresh=True)


def _fake(w: Tensor, unseen: Tensor, factor: Tensor, inverse: bool, drift: Tensor | None, scale: Tensor | None,
          zero: Tensor | None, group: Tensor | None, unit: Tensor | None, group_size: int,
          *_: Any) -> tuple[Tensor, ...]:
    groups = 0 if scale is not None else (w.shape[-1] + group_size - 1) // group_size
    found = w.new_empty((*w.shape[:-1], groups))
    return (w.new_empty(w.shape, dtype=torch.uint8), w.new_empty(w.shape), w.new_empty(w.shape[:-1]), found,
            torch.empty_like(found))


gptq_columns = register("gptq_columns", fake=_fake)
