"""The Hessian of the expected return of a policy, from trajectories."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._checks import check_floating, check_integers, check_like, check_one_of, check_tensor
from ._functions import leaves, outside_of_graphs, recording, resolve
from ._trees import Tree


@outside_of_graphs
def pg_hvp(policy: Any, params: Any, v: Any, observations: Any, actions: Tensor, weights: Tensor,
           trajectory_ids: Tensor, *, reduction: str = "mean") -> Any:
    r"""The policy gradient and an unbiased product of the Hessian of the expected return with a vector.

    .. math::
        B(\tau)\, v = \nabla \Phi\, \langle \nabla \log p_\theta(\tau), v \rangle + \nabla^2 \Phi\, v, \qquad
        \Phi(\tau) = \sum_{t} \Psi_t \log \pi_\theta(a_t | s_t), \qquad
        \operatorname{E}_{\tau \sim p_\theta}[B(\tau)\, v] = \nabla^2 J(\theta)\, v

    for :math:`\Psi_t = \sum_{h \ge t} \gamma^h r_h`, less any baseline that depends on the state :math:`s_t` and not on
    the action. Each trajectory has a product of its own; the mean is taken after.

    Args:
        policy: ``policy(params, observations)`` returns the logits of categorical actions ``(N, A)``, or a
            :class:`torch.distributions.Distribution` over N actions (its log-probabilities are summed over further
            dimensions). Or ``(module, function of module and observations)``.
        params, v: as of :func:`gradops.curvature.hvp`.
        observations: anything that `policy` takes; all steps of all trajectories.
        actions: ``(N,)`` integers for logits, otherwise what the distribution's `log_prob` takes.
        weights: ``(N,)`` :math:`\Psi_t`, constants.
        trajectory_ids: ``(N,)`` integers; steps with the same number are of one trajectory, in any order. A trajectory
            must be whole: one cut in two is no longer weighted by its own score.
        reduction: ``"mean"`` over trajectories, or ``"sum"``.

    Returns:
        ``(gradient, Bv)`` with the structure of `params`, both of the return, which is to be maximised:
        :math:`\nabla \Phi` and :math:`B v`.

    One forward pass carries the change of every log-probability along v; summed over a trajectory it is the score
    :math:`\langle \nabla \log p, v \rangle`, and goes into the backward pass as the change of the weights. So the
    estimator costs one Hessian-vector product. Errors are those of :func:`gradops.curvature.hvp`; waits for the device
    once, to count trajectories. A B of one trajectory is not symmetric, only their expectation is.

    The released code of the paper multiplies the mean gradient with the mean score instead of taking products
    trajectory by trajectory, and its losses are negated, which turns the sign of that term; neither is unbiased.

    Source: I. Fatkhullin, A. Barakat, A. Kireeva, N. He, arXiv 2302.01734.

    Example:
        >>> import torch
        >>> from gradops.curvature import pg_hvp
        >>> logits = lambda theta, obs: theta.expand(len(obs), 2)
        >>> obs, ids = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> pg_hvp(logits, torch.zeros(2), torch.tensor([1.0, 0.0]), obs, torch.tensor([0, 1]), torch.ones(2), ids)
        (tensor([0., 0.]), tensor([0., 0.]))
    """
    check_one_of(reduction, "reduction", ("mean", "sum"))
    check_tensor(actions, "actions")
    check_floating(weights, "weights")
    check_integers(trajectory_ids, "trajectory_ids")
    if weights.dim() != 1:
        raise ValueError(f"weights must have shape (N,), got {tuple(weights.shape)}")
    check_like(trajectory_ids, "trajectory_ids", weights, "weights")
    function, tree = resolve(policy, params, "policy")
    vector = tree.vector(v)[0]
    weights = weights.detach()
    groups, index = trajectory_ids.unique(return_inverse=True)
    if reduction == "mean":
        weights = weights / max(len(groups), 1)

    def log_prob(tree_params: Any) -> Tensor:
        return _log_prob(function(tree_params, observations), actions, weights)

    with recording():
        try:
            gradient, product = _forward_over_reverse(log_prob, tree, vector, weights, index, len(groups), False)
        except NotImplementedError:  # silu's backward has a forward mode only while a graph is recorded
            gradient, product = _forward_over_reverse(log_prob, tree, vector, weights, index, len(groups), True)
    return tree.build(gradient), tree.build(product)


def _forward_over_reverse(
    log_prob: Callable[[Any], Tensor], tree: Tree, vector: list[Tensor], weights: Tensor, index: Tensor, groups: int,
    create_graph: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    points = [p.requires_grad_() for p in leaves(tree)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(points, vector, strict=True)]
        logp = log_prob(tree.build(duals))
        if not logp.requires_grad:
            raise ValueError("the policy depends on none of params: it must be computed from its argument")
        change = forward_ad.unpack_dual(logp).tangent
        change = torch.zeros_like(logp) if change is None else change.detach()
        weights = weights.to(logp.dtype)
        score = change.new_zeros(groups).index_add_(0, index, change)
        seed = forward_ad.make_dual(weights, weights * score[index])
        grads = torch.autograd.grad(logp, points, seed, create_graph=create_graph, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError("the policy depends on none of params: it must be computed from its argument")
        parts = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in grads]
    zero = lambda x, p: torch.zeros_like(p, requires_grad=False) if x is None else x.detach()
    return ([zero(g, p) for (g, _), p in zip(parts, points, strict=True)],
            [zero(t, p) for (_, t), p in zip(parts, points, strict=True)])


def _log_prob(out: Any, actions: Tensor, weights: Tensor) -> Tensor:
    if isinstance(out, torch.distributions.Distribution):
        logp = out.log_prob(actions)
        logp = logp.reshape(logp.shape[0], -1).sum(1) if logp.dim() > 1 else logp
    else:
        check_floating(out, "the result of policy")
        if out.dim() != 2:
            raise ValueError(f"policy must return logits (N, A) or a Distribution, got shape {tuple(out.shape)}")
        check_integers(actions, "actions")
        if actions.shape != out.shape[:1]:
            raise ValueError(f"actions must have shape (N,) = {tuple(out.shape[:1])}, got {tuple(actions.shape)}")
        logp = out.log_softmax(-1).gather(1, actions.long()[:, None])[:, 0]
    if logp.shape != weights.shape:
        raise ValueError(f"weights must have shape (N,) = {tuple(logp.shape)}, as the actions of policy, got "
                         f"{tuple(weights.shape)}")
    return logp
