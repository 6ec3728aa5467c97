"""The Hessian of the softmax cross entropy, times a vector. Its kernels stand in the room of `cross_entropy`."""
from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_floating, check_like
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register
from .cross_entropy import check_rule, check_target

_op = register("softmax_ce_hvp", fake=lambda z, *_: torch.empty_like(z, memory_format=torch.contiguous_format))
_out = register("softmax_ce_hvp_out", fake=lambda *_: None, vmap=False)


@allow_in_graph
def softmax_ce_hvp(logits: Tensor, u: Tensor, target: Tensor | None = None, *, reduction: str = "mean",
                   ignore_index: int = -100, label_smoothing: float = 0.0, out: Tensor | None = None) -> Tensor:
    r"""The product of the cross entropy's Hessian in the logits with a vector, in one visit of each row.

    .. math:: H u = c\,\bigl(p \circ u - p\,(p^\top u)\bigr), \qquad p = \mathrm{softmax}(z)

    for each row of logits, with c = 1 for a sum of losses, and one over the number of rows for a mean. It is also the
    Gauss-Newton and the Fisher matrix of the logits, and depends neither on targets nor on label smoothing.

    Args:
        logits: ``(..., C)``; float64, float32, bfloat16 or float16. Not modified, unless it is ``out``.
        u: the vector, a tensor like ``logits``.
        target: ``(...)``, int64 or int32, only to say which rows are left out: those equal to ``ignore_index``, which
            get zeros and do not count in a mean. None: none is.
        reduction: ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1]; changes nothing.
        out: where to put the result, a tensor like ``logits``; may be ``u`` or ``logits`` itself, but must not overlap
            them otherwise.

    Returns:
        H u, of the shape and dtype of ``logits``; ``out``, if it was given.

    Raises:
        TypeError: an argument is no tensor of its kind, or dtypes differ.
        ValueError: shapes, devices or numbers do not fit.
        RuntimeError: a derivative is asked for: this is one already; :func:`cross_entropy` has them.

    A logit of -inf has p = 0 and gives 0; a row of nothing else, or with a NaN, is NaN. Arithmetic is in float32
    (float64 for float64), with sums carried on in float64: within 1e-6, relative, of the exact one, before it is
    rounded. Reads logits and u from memory once and writes once, with no other memory.

    Source: N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.

    Example:
        >>> import torch
        >>> from gradops.curvature import softmax_ce_hvp
        >>> softmax_ce_hvp(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([[ 0.1250, -0.1250],
                [ 0.0000,  0.0000]])
    """
    check_floating(logits, "logits")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least 1 class, (..., C), got {tuple(logits.shape)}")
    for x, name in ((u, "u"), (logits if out is None else out, "out")):
        check_like(x, name, logits, "logits")
        if x.dtype != logits.dtype:
            raise TypeError(f"{name} must have the dtype of logits, {logits.dtype}, got {x.dtype}")
    rows = logits.shape[:-1]
    if target is not None:
        check_target(target, rows, logits, "logits")
    check_rule(ignore_index, reduction, ("mean", "sum"), label_smoothing)
    refuse_derivative("softmax_ce_hvp", logits=logits, u=u)
    if target is None:
        scale = logits.new_ones(rows, dtype=torch.float64)
        count: Tensor | int = scale.numel()
    else:
        scale = (target != ignore_index).double()
        count = scale.sum().clamp(min=1)
    if reduction == "mean":
        scale = scale / count
    if out is None:
        return _op(logits, u, scale)
    if out.is_contiguous():
        _out(logits, u, scale, out)
        return out
    return out.copy_(_op(logits, u, scale))
