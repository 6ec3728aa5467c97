"""Nucleus sets: the action space of a masked policy."""
import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_ids, check_integers
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register

_op = register("top_p_keep", fake=lambda logits, p, min_keep: torch.empty(
    logits.shape, dtype=torch.bool, device=logits.device))


@allow_in_graph
def _keep(logits: Tensor, p: float, always_keep: Tensor | None, min_keep: int) -> Tensor:
    mask = _op(logits, p, min_keep)
    if always_keep is not None:
        ids = always_keep.long().expand(*logits.shape[:-1], always_keep.shape[-1])
        mask = mask.scatter(-1, ids, torch.ones_like(ids, dtype=torch.bool))
    return mask.view(-1, logits.shape[-1])


def top_p_keep(logits: Tensor, p: float, always_keep: Tensor | None = None, min_keep: int = 1,
               ) -> tuple[Tensor, Tensor]:
    r"""The nucleus of each row: its likeliest entries, until their mass reaches p.

    .. math::
        \mathrm{keep} = \{ j : \textstyle\sum_{i \succ j} p_i < p \}, \qquad p_i = \mathrm{softmax}(x)_i

    where :math:`i \succ j` if i is likelier, or as likely with the lower id. So the entry that crosses p is kept, as in
    nucleus sampling (Holtzman et al., arXiv 1904.09751) and NLPO (Ramamurthy et al., arXiv 2210.01241, whose code has
    ``top_mask`` for p and ``min_tokens_to_keep``). With p = 1 every entry is kept that is not masked by -inf. A row
    that has no softmax (a NaN, +inf, or nothing but -inf) keeps everything.

    Args:
        logits: ``(..., V)``; float64, float32, bfloat16 or float16; divided by the temperature, if there is one.
        p: the mass, in (0, 1].
        always_keep: ids to keep whatever they are, in [0, V): ``(S,)`` for all rows, such as special tokens, or
            ``(..., S)`` for each, such as the targets of :func:`selective_log_softmax`. int64 or int32.
        min_keep: at least as many of the likeliest are kept (all of a row shorter than that).

    Returns:
        ``keep_ids``, int64, ascending within each row, and ``keep_offsets``, int64 of one entry more than rows: row r,
        counted over all leading dimensions, keeps ``keep_ids[keep_offsets[r]:keep_offsets[r + 1]]``. These are what
        :func:`selective_log_softmax` takes.

    Raises:
        TypeError: an argument is no dense tensor of its kind.
        ValueError: shapes, devices or numbers do not fit; on the CPU, an id outside [0, V).
        RuntimeError: ``logits`` asks for a derivative; the sets are constants.

    The edge of the nucleus is found by bisection over the logits, about 32 sums over a row, with no sort. A mass within
    1e-6 of p (1e-15 for float64) may fall to either side. How much is kept is only known afterwards, so on CUDA this
    waits for the device and cannot be captured in a CUDA graph.

    Example:
        >>> import torch
        >>> from gradops.rl import top_p_keep
        >>> p = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
        >>> top_p_keep(p.log(), 0.7)
        (tensor([1, 2, 0, 1, 2]), tensor([0, 2, 5]))
    """
    check_floating(logits, "logits")
    if logits.dim() < 1:
        raise ValueError("logits must have at least 1 dimension (..., V), got shape ()")
    if not 0 < p <= 1:
        raise ValueError(f"p must be in (0, 1], got {p}")
    if min_keep < 1:
        raise ValueError(f"min_keep must be at least 1, got {min_keep}")
    if always_keep is not None:
        check_integers(always_keep, "always_keep")
        check_device(always_keep, "always_keep", logits, "logits")
        if always_keep.dim() != 1 and always_keep.shape[:-1] != logits.shape[:-1]:
            raise ValueError(f"always_keep must have shape (S,) or {(*logits.shape[:-1], 'S')}, "
                             f"got {tuple(always_keep.shape)}")
        check_ids(always_keep, "always_keep", logits.shape[-1])
    refuse_derivative("top_p_keep", logits=logits)
    mask = _keep(logits, float(p), always_keep, min_keep)
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(mask.sum(-1), 0, out=offsets[1:])
    return mask.nonzero()[:, 1].contiguous(), offsets
