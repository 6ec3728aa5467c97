"""The Gauss-Newton matrix of an output layer's cross-entropy, times a vector."""
from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_like, check_linear
from .._compiler import allow_in_graph
from .._op import _library, refuse_derivative, register
from ._linear_ce_chunks import ggn, ggn_outputs
from .cross_entropy import check_rule, check_target

_library.define("linear_ce_ggnvp(Tensor hidden, Tensor weight, Tensor? hidden_dot, Tensor? weight_dot, Tensor scale) "
                "-> (Tensor, Tensor)")
torch.library.impl(_library, "linear_ce_ggnvp", "CompositeExplicitAutograd")(ggn)
_op = register("linear_ce_ggnvp", fake=ggn_outputs)


@allow_in_graph
def linear_ce_ggnvp(h: Tensor, W: Tensor, h_dot: Tensor | None, W_dot: Tensor | None, targets: Tensor | None, *,
                    reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0,
                    ) -> tuple[Tensor, Tensor]:
    r"""The product of the generalised Gauss-Newton matrix of :func:`linear_cross_entropy`, in h and W, with a vector.

    .. math::
        u = \dot h W^\top + h \dot W^\top, \qquad R = c\,(p \circ u - p\,(p^\top u)), \qquad
        G(\dot h, \dot W) = (R W,\; R^\top h), \qquad p = \mathrm{softmax}(h W^\top)

    with c = 1 for a sum of losses, and one over the number of rows for a mean. Depends neither on targets nor on label
    smoothing. It is positive semidefinite, and the Fisher matrix of the layer.

    Args:
        h: ``(..., H)``; float64, float32, bfloat16 or float16. Not modified.
        W: ``(V, H)``, of the dtype of ``h``.
        h_dot, W_dot: the vector, tensors like ``h`` and ``W``; None for zeros, but not both.
        targets: ``(...)``, int64 or int32, only to say which rows are left out: those equal to ``ignore_index``, which
            do not count in a mean. None: none is.
        reduction: ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1]; changes nothing.

    Returns:
        The two parts of the product, like ``h`` and ``W``.

    Raises:
        TypeError: an argument is no dense tensor of its kind, or dtypes differ.
        ValueError: shapes, devices or numbers do not fit, or neither h_dot nor W_dot is given.
        RuntimeError: a derivative is asked for.

    Costs 10 N H V operations, and two matrices of logits of a chunk of rows, as in :func:`linear_cross_entropy`, whose
    accuracy it has.

    Source: N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.

    Example:
        >>> import torch
        >>> from gradops.curvature import linear_ce_ggnvp
        >>> linear_ce_ggnvp(torch.ones(1, 1), torch.zeros(2, 1), None, torch.tensor([[1.0], [0.0]]), None)
        (tensor([[0.]]), tensor([[ 0.2500],
                [-0.2500]]))
    """
    check_linear(h, W, None, "h", "W")
    rows = h.shape[:-1]
    if h_dot is None and W_dot is None:
        raise ValueError("h_dot or W_dot must be given, got None for both")
    for x, name, y, other in ((h_dot, "h_dot", h, "h"), (W_dot, "W_dot", W, "W")):
        if x is not None:
            check_like(x, name, y, other)
            if x.dtype != y.dtype:
                raise TypeError(f"{name} must have the dtype of {other}, {y.dtype}, got {x.dtype}")
    if targets is not None:
        check_target(targets, rows, h, "h")
    check_rule(ignore_index, reduction, ("mean", "sum"), label_smoothing)
    refuse_derivative("linear_ce_ggnvp", h=h, W=W, h_dot=h_dot, W_dot=W_dot)
    if targets is None:
        kept = h.new_ones(rows, dtype=torch.float64)
    else:
        kept = (targets != ignore_index).double()
    scale = kept / kept.sum().clamp(min=1) if reduction == "mean" else kept
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (h, h_dot)]
    d_h, d_W = _op(flat[0], W, flat[1], W_dot, scale.reshape(-1))
    return d_h.reshape(h.shape).to(h.dtype), d_W.to(W.dtype)
