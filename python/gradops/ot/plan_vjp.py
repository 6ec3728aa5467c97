"""How a plan answers to a change of costs and weights while its support stays: behind the derivatives of `solve`.

The kernel is for the CPU; plans on CUDA have no derivative yet, and say so.
"""
from typing import Any

import torch
from torch import Tensor

from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, register

_op = register("plan_vjp", fake=lambda index, value, g, p, q: (torch.empty_like(g), torch.empty_like(p),
                                                               torch.empty_like(q)))


@allow_in_graph
def plan_vjp(index: Tensor, value: Tensor, g: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Splits numbers on the support of a plan into a part that leaves both marginals alone and potentials.

    .. math:: g_{ij} = r_{ij} + u_i + v_j \quad (t_{ij} > 0), \qquad
        \textstyle\sum_j r_{ij} = -p_i, \quad \sum_i r_{ij} = -q_j

    With ``p`` and ``q`` zero, r is the orthogonal projection of g. A quadratically regularised plan whose support stays
    moves by :math:`dT = r` for :math:`g = -dM / reg`, :math:`p = -da`, :math:`q = -db`; and gradients of what is
    computed from T are :math:`-r / reg` in M, u in a and v in b for :math:`g` the gradient in T.

    Args:
        index: ``(..., m, width)`` int64: the rows of every column's entries.
        value: ``(..., m, width)`` float64: the entries; those that are positive are the support. A constant here:
            which entries are positive does not change for a small change of anything.
        g: ``(..., m, width)`` float64.
        p: ``(..., n)`` float64.
        q: ``(..., m)`` float64.

    Returns:
        r ``(..., m, width)``, zero outside the support, u ``(..., n)`` and v ``(..., m)``. In a connected component of
        the support u has mean 0; what of ``p`` and ``q`` would move mass between components is left out.

    Conjugate gradients, O(entries) a step. Linear, and differentiable to any order in ``g``, ``p`` and ``q``.
    """
    if value.is_cuda:
        raise RuntimeError("solve: the derivative of a plan is on the CPU only; solve there, or differentiate value")
    if needs_derivative(g, p, q):
        return _PlanVjp.apply(index, value, g, p, q)
    return _op(index, value, g, p, q)


class _PlanVjp(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(index: Tensor, value: Tensor, g: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _op(index, value, g, p, q)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, r: Tensor, u: Tensor, v: Tensor):
        index, value = ctx.saved_tensors
        g, p, q = plan_vjp(index, value, r, -u, -v)
        return None, None, g, -p, -q

    @staticmethod
    def jvp(ctx: Any, _index: Any, _value: Any, g: Tensor, p: Tensor, q: Tensor):
        index, value = ctx.saved_tensors
        return plan_vjp(index, value, g, p, q)
