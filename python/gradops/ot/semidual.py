"""The semi-dual objective of sparse optimal transport."""
from typing import Any

import torch
from torch import Tensor

from .._checks import may_look
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, register
from ._problem import Costs, check_costs, check_max_nz, check_reg, check_weights, common_batch, in_batch
from .sparse_plan import SparsePlan


def _fake(alpha, M, x, y, a, b, reg, max_nz, width, *warm):
    index = b.new_empty(*b.shape, width, dtype=torch.int64)
    return (alpha.new_empty(alpha.shape[:-1]), torch.empty_like(alpha, memory_format=torch.contiguous_format), index,
            index.new_empty(index.shape, dtype=torch.float64),
            torch.empty_like(b, memory_format=torch.contiguous_format), index.new_empty(b.shape))


_op = register("semidual", fake=_fake)


def semidual(
    alpha: Tensor,
    M: Tensor | None,
    a: Tensor,
    b: Tensor,
    reg: float,
    max_nz: int | None = None,
    *,
    x: Tensor | None = None,
    y: Tensor | None = None,
    metric: str = "sqeuclidean",
    warm: tuple[Tensor, SparsePlan, Tensor] | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor, SparsePlan, Tensor]:
    r"""The semi-dual objective of optimal transport with few entries per column, its gradient and its plan.

    .. math:: D(\alpha) = \langle\alpha, a\rangle - \sum_j \omega_j(\alpha - c_j), \qquad
        \omega_j(x) = \max\{\langle x, t\rangle - \tfrac{\gamma}{2}\|t\|^2 :
        t \ge 0, \textstyle\sum_i t_i = b_j, \|t\|_0 \le k\}

    with :math:`\gamma` = ``reg`` and k = ``max_nz``. The maximum is a solution of transport with those costs plus
    :math:`\gamma/2\,\|T\|^2`; without ``max_nz`` this is quadratically regularised transport, and with it a relaxation
    of the problem with at most k entries per column. Column j of the plan is
    :math:`t_{ij} = (\alpha_i - c_{ij} - \tau_j)_+/\gamma` on the k largest of :math:`\alpha_i - c_{ij}` (ties: the
    lowest rows), so columns sum to ``b`` and rows need not sum to ``a``: the gradient, ``a`` minus the row sums, says
    by how much.

    One pass over the costs: entries are compared with a threshold where they lie, in the costs' own precision, and the
    few that can matter are finished in float64.

    Args:
        alpha: ``(..., n)``, potentials of the rows; any real floating-point dtype, taken to float64.
        M: ``(..., n, m)``, costs; float64, float32, bfloat16 or float16. ``+inf`` where nothing may be moved. None: the
            costs are the squared distances of ``x`` and ``y``.
        a, b: ``(..., n)`` and ``(..., m)``, weights of rows and columns, not negative. They need not sum alike here.
        reg: weight of the quadratic term, positive.
        max_nz: the most entries of a column; None or any number from n on: no bound.
        x, y: points ``(..., n, d)`` and ``(..., m, d)`` of one dtype, instead of ``M``. Distances are never stored, and
            summed from the differences of coordinates.
        metric: only ``"sqeuclidean"``.
        warm: ``(alpha, plan, tau)`` of an earlier call at an ``alpha`` nearby, which saves the search for thresholds.
            Whatever is given, the result is the same; if the costs or ``reg`` have changed since, it only takes longer.
        width: slots per column of the plan. Default: ``max_nz``; without one, as many as the widest column needs, or n
            where looking at the numbers would make the device wait or break a graph (CUDA, torch.compile, torch.func).

    Returns:
        ``(value, grad, plan, tau)``: D ``(...)``; its gradient ``(..., n)``; a `SparsePlan`; thresholds ``(..., m)``.
        All numbers are float64. A column with ``b_j = 0`` has no mass and ``tau_j`` the largest of
        :math:`\alpha_i - c_{ij}`; one without a finite cost has ``tau_j = -inf``, and makes D infinite if it has mass.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, ``reg`` or ``max_nz`` is not positive; on CPU also: ``alpha`` or a weight is not
            finite, a weight is negative, costs hold NaN or ``-inf``, or ``width`` is too small. On CUDA the items
            concerned are NaN instead.

    Differentiable to any order, in both modes, in ``alpha``, ``a``, ``b`` and the costs, with the plan's support held
    fixed: exact where no two candidates tie for a place in it, one of the one-sided derivatives where they
    do. The derivative of ``value`` is the envelope theorem's: ``grad`` in ``alpha``, ``plan`` in ``M``, ``alpha`` in
    ``a``, ``-tau`` in ``b``.

    The semi-dual of Blondel, Seguy and Rolet (2018, section 4) with the sparsity constraint of Liu, Puigcerver and
    Blondel (arXiv 2209.15466, sections 3 and 4); POT: ``ot.smooth``. :math:`O(nm)` time, :math:`O(n + mk)` memory.

    Example:
        >>> import torch
        >>> from gradops.ot import semidual
        >>> M = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> half = torch.full((2,), 0.5)
        >>> value, grad, plan, tau = semidual(torch.zeros(2), M, half, half, reg=1.0, max_nz=1)
        >>> value, grad
        (tensor(0.2500, dtype=torch.float64), tensor([0., 0.], dtype=torch.float64))
    """
    costs = check_costs(M, x, y, metric)
    n, m = costs.size
    check_weights(alpha, "alpha", n, costs)
    check_weights(a, "a", n, costs)
    check_weights(b, "b", m, costs)
    check_reg(reg)
    check_max_nz(max_nz)
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, or None, got {width}")
    alpha, a, b = _double(alpha), _double(a), _double(b)
    batch: tuple[int, ...] = ()
    if not (M is not None and M.dim() == 2 and alpha.dim() == a.dim() == b.dim() == 1):  # one problem: next to no time
        batch = common_batch(alpha.shape[:-1], a.shape[:-1], b.shape[:-1], *costs.batches)
        costs = Costs(*(t if t is None else in_batch(t, batch, 2) for t in costs))
        alpha, a, b = (in_batch(t, batch, 1) for t in (alpha, a, b))
    state = _state(warm, batch, n, m)
    most = n if max_nz is None else min(max_nz, n)
    open_width = width < most if width is not None else most == n  # columns may need more slots than these
    known = open_width and all(may_look(t) for t in (alpha, a, b, *costs.tensors))
    slots = width if width is not None else min(n, 32) if known else most

    def run(slots: int, *state: Tensor | None) -> tuple[Tensor, ...]:
        return _evaluate(alpha, *costs, a, b, float(reg), most, slots, *state)

    value, grad, index, weight, tau, kept = run(slots, *state)
    if known and slots < most:
        widest = max(int(kept.max()), 1) if kept.numel() else 1
        if width is not None and widest > width:
            raise ValueError(f"width must be at least {widest}, the entries of the plan's fullest column, got {width}")
        if widest > slots:
            value, grad, index, weight, tau, kept = run(widest, None, None, None, None)
        elif width is None:
            index, weight = index[..., :widest], weight[..., :widest]
    return value, grad, SparsePlan(index, weight, (*batch, n, m)), tau


def _double(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.double()


def _state(warm: tuple[Tensor, SparsePlan, Tensor] | None, batch: tuple[int, ...], n: int, m: int
           ) -> tuple[Tensor | None, ...]:
    """The tensors of `warm`, which carry no derivative."""
    if warm is None:
        return (None,) * 4
    alpha, plan, tau = warm
    for name, shape, expected in (("alpha", alpha.shape, (*batch, n)), ("plan", plan.shape, (*batch, n, m)),
                                  ("tau", tau.shape, (*batch, m))):
        if shape != expected:
            raise ValueError(f"the {name} of warm must have shape {expected}, got {tuple(shape)}")
    weight = plan.values
    if needs_derivative(alpha, weight, tau):
        alpha, weight, tau = alpha.detach(), weight.detach(), tau.detach()
    return _double(alpha), plan.indices, weight, tau


@allow_in_graph
def _evaluate(alpha: Tensor, M: Tensor | None, x: Tensor | None, y: Tensor | None, a: Tensor, b: Tensor, reg: float,
              max_nz: int, width: int, *warm: Tensor | None) -> tuple[Tensor, ...]:
    tensors = [t for t in (alpha, M, x, y, a, b) if t is not None]
    if needs_derivative(*tensors):
        index, kept = _Support.apply(alpha, M, x, y, a, b, reg, max_nz, width, *warm)
        return _on_support(alpha, Costs(M, x, y), a, b, reg, index, kept)
    return _op(alpha, M, x, y, a, b, reg, max_nz, width, *warm)


class _Support(Function):
    """The rows of each column's entries: whole numbers, without derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        out = _op(*args)
        return out[2], out[5]

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_):
        return (None,) * 13

    @staticmethod
    def jvp(ctx: Any, *_):
        return None, None


def _on_support(alpha: Tensor, costs: Costs, a: Tensor, b: Tensor, reg: float, index: Tensor, kept: Tensor
                ) -> tuple[Tensor, ...]:
    """What the op computes, from the few entries it found, in differentiable torch."""
    m, width = index.shape[-2:]
    flat = index.flatten(-2)
    if costs.M is not None:
        entries = costs.M.mT.gather(-1, index).to(torch.float64)
    else:
        assert costs.x is not None and costs.y is not None
        points = costs.x.to(torch.float64).gather(-2, flat[..., None].expand(*flat.shape, costs.x.shape[-1]))
        difference = points.unflatten(-2, (m, width)) - costs.y.to(torch.float64)[..., None, :]
        entries = (difference * difference).sum(-1)
    gains = alpha.gather(-1, flat).unflatten(-1, (m, width)) - entries
    used = torch.arange(width, device=index.device) < kept[..., None]
    size = kept.clamp(min=1).to(torch.float64)
    gains = torch.where(used, gains, 0.0)
    top = gains.detach().where(used, -torch.inf).amax(-1)
    relative = torch.where(used, gains - top[..., None], 0.0)
    tau = (relative.sum(-1) - reg * b) / size
    weight = torch.where(used, (relative - tau[..., None]) / reg, 0.0)
    omega = (weight * (gains - 0.5 * reg * weight)).sum(-1)
    value = (alpha * a).sum(-1) - omega.sum(-1)
    mass = torch.zeros_like(a).scatter_add(-1, flat, weight.flatten(-2))
    return value, a - mass, index, weight, top + tau, kept
