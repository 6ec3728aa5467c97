"""Log-probabilities of chosen entries, with entropy and moments, from one read of the logits."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_integers
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, primals, register

OUTPUTS = ("logp", "lse", "entropy", "sum_p2", "sum_p3")


def _fake(logits, index, keep_ids, keep_offsets, temperature, softcap, entropy, moments, partial):
    rows = logits.shape[:-1]
    shapes = (index.shape, rows, rows if entropy else (*rows, 0), *[rows if moments else (*rows, 0)] * 2)
    return tuple(logits.new_empty(shape, dtype=torch.float64) for shape in shapes)


_op = register("selective_log_softmax", fake=_fake)
_backward = register("selective_log_softmax_backward", fake=lambda logits, *_: torch.empty_like(
    logits, memory_format=torch.contiguous_format))
# for those who own the logits, as linear_logprob does: writes the gradient over them
register("selective_log_softmax_backward_", fake=lambda *_: None, vmap=False)


@allow_in_graph
def selective_log_softmax(logits: Tensor, index: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
                          keep_ids: Tensor | None = None, keep_offsets: Tensor | None = None, renormalize: bool = True,
                          return_: Sequence[str] = ("logp",), out_dtype: torch.dtype = torch.float32,
                          ) -> Tensor | tuple[Tensor, ...]:
    r"""Log-probabilities of chosen entries of a softmax, and what else one read of the logits can tell.

    .. math::
        z = \frac{c(x)}{T}, \quad p = \mathrm{softmax}(z), \qquad \mathrm{logp} = z_{index} - \mathrm{lse}, \quad
        \mathrm{lse} = \log \sum_j e^{z_j}, \quad \mathrm{entropy} = -\sum_j p_j \log p_j, \quad
        \mathrm{sum\_p2} = \sum_j p_j^2, \quad \mathrm{sum\_p3} = \sum_j p_j^3

    with :math:`T` the ``temperature`` and :math:`c(x)` = ``softcap * tanh(x / softcap)``, or :math:`x` without
    a softcap. A logit of -inf is a masked entry: it has p = 0 under a softcap as well, adds nothing to the entropy, and
    a target there has logp = -inf; a row of nothing else is NaN. logp never exceeds 0.

    Args:
        logits: ``(..., V)``; float64, float32, bfloat16 or float16. Not modified.
        index: ``(...)``, or ``(..., K)`` for K entries of each row; int64 or int32, in [0, V).
        temperature: divides the (capped) logits.
        softcap: bounds the logits, as Gemma 2 does; before the temperature.
        keep_ids, keep_offsets: a set of entries for each row, as :func:`top_p_keep` gives them; rows counted over all
            leading dimensions. Row r keeps ``keep_ids[keep_offsets[r]:keep_offsets[r + 1]]``, which ascend; int64 or
            int32. A target outside its row's set has logp = -inf.
        renormalize: True: the softmax is over the kept entries. False: it is over all of them, and the sets only decide
            which targets have a probability.
        return_: which results, and in which order: of "logp", "lse", "entropy", "sum_p2" and "sum_p3".
        out_dtype: of the results: float32 or float64.

    Returns:
        What ``return_`` names: one tensor if it names one, else a tuple. logp has the shape of ``index``, the others
        ``(...)``; in nats.

    Raises:
        TypeError: an argument is no dense tensor of its kind, or ``out_dtype`` is another.
        ValueError: shapes, devices, names or numbers do not fit; on the CPU, an index outside [0, V), or keep sets that
            do not ascend within it. On CUDA these are not checked, since that would stop the stream: such a target has
            logp = NaN, such a set gives anything.

    Arithmetic is in float32 (float64 for float64 logits), with sums carried on in float64: logp and entropy are within
    3e-6 of exact ones for the logits as given, 16-bit ones included, before ``out_dtype`` rounds them; where softcap /
    temperature exceeds 30, within 1e-7 softcap / temperature (on CUDA twice that, from 15 on). (`F.cross_entropy`, and
    TRL's function of this name, give 16-bit results for 16-bit logits, with errors up to 0.07.)

    NLPO (Ramamurthy et al., arXiv 2210.01241) takes its log-probabilities with ``renormalize=False`` and its
    entropy with True; its code gives log(float32 eps), not -inf, to what is outside the set.

    Reads the logits once and allocates no other ``(..., V)`` tensor. The gradient with respect to the logits, for
    logp, lse and entropy, is one read and one write; a row whose incoming gradients are all 0 is not read. On the CPU,
    from torch 2.11 on, one of 8 MiB or more takes the memory of one that was freed before, if its size is like; such
    memory the system may take back when it runs short.
    Second derivatives, forward mode and derivatives of the moments go through plain PyTorch.

    Example:
        >>> import torch
        >>> from gradops.rl import selective_log_softmax
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, -torch.inf, 9.0, 0.0]])
        >>> selective_log_softmax(logits, torch.tensor([3, 0]), return_=("logp", "entropy"))
        (tensor([-1.3863, -0.6932]), tensor([1.3863, 0.6938]))
    """
    _check(logits, index, temperature, softcap, keep_ids, keep_offsets, return_, out_dtype)
    single = index.dim() == logits.dim() - 1
    at = index[..., None] if single else index
    sets = (None, None) if keep_ids is None or not renormalize else (keep_ids.long(), keep_offsets.long())  # type: ignore[union-attr]
    args = (logits, at.long(), *sets, float(temperature), float(softcap or 0), "entropy" in return_,
            "sum_p2" in return_ or "sum_p3" in return_)
    results = dict(zip(OUTPUTS, _SelectiveLogSoftmax.apply(*args) if needs_derivative(logits) else _op(*args, False),
                       strict=True))
    if keep_ids is not None and keep_offsets is not None and not renormalize:
        kept = _in_sets(at, keep_ids, keep_offsets, logits.shape[-1])
        results["logp"] = results["logp"].masked_fill(~kept, -torch.inf)
    if single:
        results["logp"] = results["logp"].squeeze(-1)
    out = tuple(results[name].to(out_dtype) for name in return_)
    return out[0] if len(out) == 1 else out


def _check(logits: Any, index: Any, temperature: float, softcap: float | None, keep_ids: Any, keep_offsets: Any,
           return_: Sequence[str], out_dtype: torch.dtype) -> None:
    check_floating(logits, "logits")
    if logits.dim() < 1:
        raise ValueError("logits must have at least 1 dimension (..., V), got shape ()")
    check_integers(index, "index")
    check_device(index, "index", logits, "logits")
    rows = logits.shape[:-1]
    if index.shape != rows and (index.dim() != logits.dim() or index.shape[:-1] != rows):
        raise ValueError(f"index must have the shape {tuple(rows)}, or that and one dimension more, for logits of "
                         f"shape {tuple(logits.shape)}; got {tuple(index.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    if (keep_ids is None) != (keep_offsets is None):
        raise ValueError("keep_ids and keep_offsets must be given together")
    for x, name in ((keep_ids, "keep_ids"), (keep_offsets, "keep_offsets")):
        if x is None:
            continue
        check_integers(x, name)
        check_device(x, name, logits, "logits")
        if x.dim() != 1:
            raise ValueError(f"{name} must have 1 dimension, got shape {tuple(x.shape)}")
    if keep_offsets is not None and len(keep_offsets) != rows.numel() + 1:
        raise ValueError(f"keep_offsets must have one entry more than there are rows of logits, {rows.numel() + 1}, "
                         f"got {len(keep_offsets)}")
    if isinstance(return_, str) or not return_ or any(name not in OUTPUTS for name in return_):
        raise ValueError(f"return_ must be a sequence of names out of {', '.join(OUTPUTS)}, got {return_!r}")
    if out_dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out_dtype must be torch.float32 or torch.float64, got {out_dtype}")


def _row_of_each(keep_ids: Tensor, keep_offsets: Tensor) -> Tensor:
    rows = torch.arange(len(keep_offsets) - 1, device=keep_ids.device)
    return torch.repeat_interleave(rows, keep_offsets.diff(), output_size=len(keep_ids))  # no look at the sizes


def _in_sets(index: Tensor, keep_ids: Tensor, keep_offsets: Tensor, vocabulary: int) -> Tensor:
    rows = torch.arange(len(keep_offsets) - 1, device=index.device).view(*index.shape[:-1], 1)
    return torch.isin(rows * vocabulary + index, _row_of_each(keep_ids, keep_offsets) * vocabulary + keep_ids)


class _Softmax:
    """The same in differentiable torch, whole: z and its slope in the logits, log p, p."""

    def __init__(self, logits: Tensor, keep_ids: Tensor | None, keep_offsets: Tensor | None, temperature: float,
                 softcap: float) -> None:
        x = logits if logits.dtype == torch.float64 else logits.float()
        self.slope = torch.full_like(x, 1 / temperature)
        if softcap:
            t = (x / softcap).tanh()
            self.slope = (1 - t * t) / temperature
            x = torch.where(x == -torch.inf, x, softcap * t)
        z = x / temperature
        if keep_ids is not None and keep_offsets is not None:
            keep = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).view(-1, logits.shape[-1])
            keep[_row_of_each(keep_ids, keep_offsets), keep_ids] = True
            z = z.masked_fill(~keep.view(logits.shape), -torch.inf)
        logp = z.log_softmax(-1)
        self.p = logp.exp()
        self.masked = z == -torch.inf
        self.logp = logp.masked_fill(self.masked, 0)  # where p is 0 it must be finite
        self.entropy, self.sum_p2, self.sum_p3 = (
            (self.p * t).sum(-1, keepdim=True) for t in (-self.logp, self.p, self.p * self.p))


def _gradient(s: _Softmax, index: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    """Of all five outputs, with respect to the logits."""
    g_logp, g_lse, g_entropy, g_p2, g_p3 = (None if g is None else g.to(s.p.dtype) for g in grads)
    out = torch.zeros_like(s.p)
    if g_logp is not None:
        out = out.scatter_add(-1, index, g_logp).masked_fill(s.masked, 0) - s.p * g_logp.sum(-1, keepdim=True)
    if g_lse is not None:
        out = out + s.p * g_lse[..., None]
    if g_entropy is not None:
        out = out - s.p * (s.logp + s.entropy) * g_entropy[..., None]
    if g_p2 is not None:
        out = out + 2 * s.p * (s.p - s.sum_p2) * g_p2[..., None]
    if g_p3 is not None:
        out = out + 3 * s.p * (s.p * s.p - s.sum_p3) * g_p3[..., None]
    return out * s.slope


class _SelectiveLogSoftmax(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits, index, keep_ids, keep_offsets, temperature, softcap, entropy, moments):
        return _op(logits, index, keep_ids, keep_offsets, temperature, softcap, entropy, moments, False)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        logits, index, keep_ids, keep_offsets, ctx.temperature, ctx.softcap, ctx.entropy, ctx.moments = inputs
        ctx.set_materialize_grads(False)
        ctx.sets = keep_ids is not None
        sets = (keep_ids, keep_offsets) if ctx.sets else ()
        ctx.save_for_backward(logits, index, output[1], output[2], *sets)
        ctx.save_for_forward(logits, index, output[1], output[2], *sets)

    @staticmethod
    def backward(ctx: Any, *grads):
        logits, index, lse, entropy, *sets = ctx.saved_tensors
        keep_ids, keep_offsets = sets or (None, None)
        g_logp, g_lse, g_entropy, g_p2, g_p3 = grads
        g_entropy = g_entropy if ctx.entropy else None
        g_p2, g_p3 = (g_p2, g_p3) if ctx.moments else (None, None)
        if ctx.moments or needs_derivative(logits, *(g for g in (g_logp, g_lse, g_entropy) if g is not None)):
            s = _Softmax(logits, keep_ids, keep_offsets, ctx.temperature, ctx.softcap)
            out = _gradient(s, index, (g_logp, g_lse, g_entropy, g_p2, g_p3)).to(logits.dtype)
        else:
            out = _backward(logits, index, keep_ids, keep_offsets, lse, entropy if ctx.entropy else None, g_logp,
                            g_lse, g_entropy, ctx.temperature, ctx.softcap)
        return out, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_):
        logits, index, _lse, _entropy, *sets = primals(ctx.saved_tensors)
        keep_ids, keep_offsets = sets or (None, None)
        s = _Softmax(logits, keep_ids, keep_offsets, ctx.temperature, ctx.softcap)
        v = (tangent.to(s.p.dtype) * s.slope).masked_fill(s.masked, 0)
        mean = (s.p * v).sum(-1, keepdim=True)
        absent = v.new_zeros(*v.shape[:-1], 0)
        out = (
            v.gather(-1, index) - mean,
            mean.squeeze(-1),
            -(s.p * (s.logp + s.entropy) * v).sum(-1) if ctx.entropy else absent,
            2 * (s.p.square() * (v - mean)).sum(-1) if ctx.moments else absent,
            3 * (s.p.pow(3) * (v - mean)).sum(-1) if ctx.moments else absent,
        )
        return tuple(t.double() for t in out)
