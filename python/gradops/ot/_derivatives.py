"""Derivatives of a solution of `solve`: of its values by the envelope theorem, of its plan while the support stays."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._op import Function, primals
from .plan_vjp import plan_vjp

# alpha, beta, indices and values of the plan, value, dual value, gap, marginal_err, ties, n_iter, status
Numbers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def differentiable(run: Callable[..., Numbers], reg: float, averaged: bool, *inputs: Tensor | None) -> Numbers:
    """run(M, x, y, a, b, and others that have no derivative), with derivatives; averaged: the plan has none."""
    return _Solution.apply(run, reg, averaged, *inputs)


class _Solution(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(run: Any, reg: float, averaged: bool, M: Tensor | None, x: Tensor | None, y: Tensor | None, a: Tensor,
                b: Tensor, alpha0: Tensor | None, n_len: Tensor | None, m_len: Tensor | None) -> Numbers:
        out = run(M, x, y, a, b, alpha0, n_len, m_len)
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in out)  # no views of each other

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        _, ctx.reg, ctx.averaged, M, x, y, a, *_ = inputs
        alpha, beta, index, T, *_ = output
        ctx.mark_non_differentiable(index, *output[-2:])
        ctx.set_materialize_grads(False)
        ctx.dtype = (a if M is None else M).dtype
        ctx.save_for_backward(x, y, alpha, beta, index, T)
        ctx.save_for_forward(x, y, alpha, beta, index, T)

    @staticmethod
    def backward(ctx: Any, to_alpha: Tensor | None, to_beta: Tensor | None, _: Any, to_plan: Tensor | None,
                 to_value: Tensor | None, to_dual: Tensor | None, *rest: Tensor | None):
        if to_alpha is not None or to_beta is not None:
            raise RuntimeError("solve: potentials have no derivative, so that value has no second derivative in a and "
                               "b; detach them")
        if any(t is not None for t in rest):
            raise RuntimeError("solve: gap, marginal_err and ties have no derivative; detach them")
        if to_plan is not None and ctx.averaged:
            raise RuntimeError("solve: an averaged plan has no derivative; detach it, or take plan_kind='sparse'")
        x, y, alpha, beta, index, T = ctx.saved_tensors
        edges, rows, columns = torch.zeros_like(T), torch.zeros_like(alpha), torch.zeros_like(beta)
        for scale in (to_value, to_dual):
            if scale is not None:
                edges, rows, columns = edges + scale[..., None, None] * T, rows + scale[..., None] * alpha, (
                    columns + scale[..., None] * beta)
        if to_plan is not None:
            r, u, v = plan_vjp(index, T, to_plan, torch.zeros_like(alpha), torch.zeros_like(beta))
            edges, rows, columns = edges - r / ctx.reg, rows + u, columns + v
        wants = ctx.needs_input_grad
        to_M = to_x = to_y = None
        if x is None:
            if wants[3]:
                dense = edges.new_zeros(*edges.shape[:-1], alpha.shape[-1]).scatter_add(-1, index, edges)
                to_M = dense.mT.to(ctx.dtype)
        elif wants[4] or wants[5]:
            pulls = 2 * edges[..., None] * _differences(x, y, index)
            to_y = -pulls.sum(-2).to(y.dtype)
            to_x = _add_rows(pulls, index, alpha.shape[-1]).to(x.dtype)
        return None, None, None, to_M, to_x, to_y, rows, columns, None, None, None

    @staticmethod
    def jvp(ctx: Any, _run: Any, _reg: Any, _averaged: Any, M: Tensor | None, x: Tensor | None, y: Tensor | None,
            a: Tensor | None, b: Tensor | None, *_: Any):
        at_x, at_y = (None if t is None else primals([t])[0] for t in ctx.saved_tensors[:2])
        alpha, beta, index, T = primals(ctx.saved_tensors[2:])
        edges = torch.zeros_like(T)
        if M is not None:
            edges = M.mT.gather(-1, index).to(torch.float64)
        for t, sign in ((x, 1), (y, -1)):
            if t is not None:
                assert at_x is not None and at_y is not None
                moved = _points(t, index) if sign > 0 else t.to(torch.float64)[..., None, :]
                edges = edges + 2 * sign * (_differences(at_x, at_y, index) * moved).sum(-1)
        a = torch.zeros_like(alpha) if a is None else a
        b = torch.zeros_like(beta) if b is None else b
        value = (T * edges).sum((-2, -1)) + (alpha * a).sum(-1) + (beta * b).sum(-1)
        plan = T * torch.nan if ctx.averaged else plan_vjp(index, T, -edges / ctx.reg, -a, -b)[0]
        quality = (value * torch.nan for _ in range(3))  # NaN rather than a silent 0
        return alpha * torch.nan, beta * torch.nan, None, plan, value, value.clone(), *quality, None, None


def _points(x: Tensor, index: Tensor) -> Tensor:
    """The points x of every entry, (..., m, width, d)."""
    flat = index.flatten(-2)[..., None]
    return x.to(torch.float64).gather(-2, flat.expand(*flat.shape[:-1], x.shape[-1])).unflatten(-2, index.shape[-2:])


def _differences(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return _points(x, index) - y.to(torch.float64)[..., None, :]


def _add_rows(pulls: Tensor, index: Tensor, n: int) -> Tensor:
    """(..., n, d): sums of what belongs to each row; index_put sorts on CUDA, where others add in any order."""
    *batch, m, width, d = pulls.shape
    first = torch.arange(0, index.numel() // max(m * width, 1) * n, n, device=index.device)[:, None]
    flat = (index.reshape(-1, m * width) + first).reshape(-1) if index.numel() else index.reshape(-1)
    sums = pulls.new_zeros(first.numel() * n, d).index_put((flat,), pulls.reshape(-1, d), accumulate=True)
    return sums.reshape(*batch, n, d)
