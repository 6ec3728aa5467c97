"""Products with the generalised Gauss-Newton matrix and the Fisher information matrix."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._checks import check_floating, check_one_of
from ._functions import Gradient, leaves, outside_of_graphs, recording, resolve
from ._trees import Tree
from .softmax_ce_hvp import softmax_ce_hvp

# From the model's outputs z and their change u = J v to the cotangent of z.
Curvature = Callable[[Tensor, Tensor], Tensor]


@outside_of_graphs
def ggnvp(model_fn: Any, loss_fn: str | Callable[[Tensor], Tensor], params: Any, v: Any, *,
          reduction: str = "mean") -> Any:
    r"""The product of the generalised Gauss-Newton matrix with a vector, in one forward and one backward pass.

    .. math:: G v = J^\top H_z J v, \qquad J = \partial z / \partial \theta, \quad H_z = \nabla^2_z \ell(z)

    Args:
        model_fn: a function of `params` that returns the outputs z; or ``(module, function of the module)``.
        loss_fn: ``"cross_entropy"``, the softmax over the last dimension of z, one example for each of the other
            indices; ``"mse"``, as :func:`torch.nn.functional.mse_loss`; or a function of z that returns the loss.
            The first two need no targets: their :math:`H_z` does not depend on them. A loss that leaves examples out
            (`ignore_index`) or weighs them is given as a function.
        params, v: as of :func:`hvp`.
        reduction: ``"mean"`` or ``"sum"``, for the named losses: over examples, or for "mse" over all elements.

    Returns:
        G v, with the structure of `params`; zeros for those that do not influence z.

    Needs forward-mode derivatives of the model, and first-order reverse ones; fused attention has no forward mode in
    torch and raises, with the way out. Other errors are those of :func:`hvp`. Costs 5/3 of a gradient's products. For
    a convex loss G is positive semidefinite.

    Source: N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.

    Example:
        >>> import torch
        >>> from gradops.curvature import ggnvp
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 1.0])
        >>> ggnvp(lambda w: x @ w, "mse", torch.zeros(2), torch.tensor([1.0, 0.0]))  # 2/n x'x v
        tensor([10., 14.])
    """
    check_one_of(reduction, "reduction", ("mean", "sum"))
    if callable(loss_fn):
        if reduction != "mean":
            raise ValueError("reduction is for the named losses; a function reduces as it likes")
        return _product(model_fn, params, v, lambda z, u: _hessian_of(loss_fn, z, u))
    check_one_of(loss_fn, "loss_fn", ("cross_entropy", "mse"))
    if loss_fn == "mse":
        return _product(model_fn, params, v, lambda z, u: u * (2 / z.numel() if reduction == "mean" else 2))
    return _product(model_fn, params, v, lambda z, u: softmax_ce_hvp(z, u, reduction=reduction))


@outside_of_graphs
def fvp(model_fn: Any, params: Any, v: Any, *, likelihood: str = "categorical", mc_samples: int = 0,
        generator: torch.Generator | None = None, reduction: str = "mean") -> Any:
    r"""The product of the Fisher information matrix with a vector.

    .. math:: F v = J^\top \operatorname{E}_{y \sim p(\cdot | z)}[s s^\top]\, J v,
              \qquad s = \nabla_z \log p(y | z)

    Args:
        model_fn: a function of `params` that returns z ``(..., C)``: the logits, or the means of a Gaussian with unit
            variance; one example for each index of the leading dimensions. Or ``(module, function of the module)``.
        params, v: as of :func:`hvp`.
        likelihood: ``"categorical"`` or ``"gaussian"``.
        mc_samples: 0 takes the expectation exactly; otherwise it is the mean over so many y for each example.
        generator: for the samples, on any device.
        reduction: ``"mean"`` over examples, or ``"sum"``.

    Returns:
        F v, with the structure of `params`. The exact one equals :func:`ggnvp` of cross-entropy, or half of that of
        the summed squared error. Samples are drawn for the outputs, so that more of them cost no further pass.

    Errors and cost are those of :func:`ggnvp`.

    Source: J. Martens, New insights and perspectives on the natural gradient method, arXiv 1412.1193.

    Example:
        >>> import torch
        >>> from gradops.curvature import fvp
        >>> fvp(lambda z: z, torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.2500, -0.2500]])
    """
    check_one_of(likelihood, "likelihood", ("categorical", "gaussian"))
    check_one_of(reduction, "reduction", ("mean", "sum"))
    if not isinstance(mc_samples, int) or mc_samples < 0:
        raise ValueError(f"mc_samples must be an integer >= 0, got {mc_samples!r}")

    def curvature(z: Tensor, u: Tensor) -> Tensor:
        if z.dim() == 0:
            raise ValueError("model_fn must return at least 1 dimension (..., C), got shape ()")
        if not mc_samples and likelihood == "categorical":
            return softmax_ce_hvp(z, u, reduction=reduction)
        w = _sampled(z, u, likelihood, mc_samples, generator) if mc_samples else u
        return w / max(z[..., 0].numel(), 1) if reduction == "mean" else w

    return _product(model_fn, params, v, curvature)


def _product(model_fn: Any, params: Any, v: Any, curvature: Curvature) -> Any:
    function, tree = resolve(model_fn, params, "model_fn")
    vector = tree.vector(v)[0]
    with recording():
        points = [p.requires_grad_() for p in leaves(tree)]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(points, vector, strict=True)]
            out = function(tree.build(duals))
            check_floating(out, "the result of model_fn")
            z, u = forward_ad.unpack_dual(out)
            if not z.requires_grad:
                raise ValueError("the outputs depend on none of params: model_fn must compute them from its argument")
            u = torch.zeros_like(z) if u is None else u.detach()
            del duals, out
        # What the graph saved has no tangents any more, so that this is a plain backward pass.
        with torch.no_grad():
            w = curvature(z.detach(), u)
        products = torch.autograd.grad(z, points, w, allow_unused=True)
    if all(h is None for h in products):
        raise ValueError("the outputs depend on none of params: model_fn must compute them from its argument")
    return tree.build([torch.zeros_like(p) if h is None else h for h, p in zip(products, points, strict=True)])


def _sampled(z: Tensor, u: Tensor, likelihood: str, samples: int, generator: torch.Generator | None) -> Tensor:
    device = z.device if generator is None else generator.device
    p = z.softmax(-1)
    drawn = torch.multinomial(p.reshape(-1, z.shape[-1]).to(device), samples, True, generator=generator).to(z.device) \
        if likelihood == "categorical" else None
    total = torch.zeros_like(z)
    for k in range(samples):
        if drawn is None:
            s = torch.randn(z.shape, dtype=z.dtype, device=device, generator=generator).to(z.device)
        else:
            s = -p
            s.scatter_add_(-1, drawn[:, k].view(*z.shape[:-1], 1), torch.ones_like(s[..., :1]))
        total += s * (s * u).sum(-1, keepdim=True)
    return total / samples


def _hessian_of(loss_fn: Callable[[Tensor], Tensor], z: Tensor, u: Tensor) -> Tensor:
    return Gradient.of(loss_fn, Tree(z, "z"), has_aux=False, values=False)[0].product([u], keep=False)[0]
