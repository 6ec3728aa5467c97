"""Entropic optimal transport: Sinkhorn's iterations."""
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._checks import check_device, check_integers, may_look
from .._op import needs_derivative, primals, register
from ._problem import Costs, check_costs, check_reg, check_weights
from .dense_plan import DensePlan
from .result import OTResult

_SAME_SUM = 1e-6  # relative: weights in float32 do not sum alike to the last bit


def _fake(costs, y, a, b, alpha0, n_len, m_len, reg, tol, max_iter):
    batch, n, m = costs.shape[:-2], costs.shape[-2], (costs.shape[-1] if y is None else y.shape[-2])
    return tuple(costs.new_empty(*batch, size, dtype=torch.float64) for size in (n, m, 5))


_op = register("entropic", fake=_fake)


def entropic(M: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None, *, reg: float = 0.05,
             x: Tensor | None = None, y: Tensor | None = None, alpha0: Tensor | None = None, tol: float = 1e-6,
             max_iter: int = 1000, n_len: Tensor | None = None, m_len: Tensor | None = None) -> OTResult:
    r"""Optimal transport with an entropic regulariser, by Sinkhorn's iterations in the log domain.

    .. math:: \min_{T \ge 0} \langle T, C \rangle + \epsilon \sum_{ij} t_{ij} (\log t_{ij} - 1)
              \quad\text{with}\quad T \mathbf{1} = a,\; T^\top \mathbf{1} = b

    and :math:`\epsilon` = ``reg``. The plan is :math:`t_{ij} = \exp((\alpha_i + \beta_j - c_{ij}) / \epsilon)`, the same
    as of POT's ``ot.sinkhorn(a, b, M, reg)``; POT's objective :math:`\epsilon \sum t \log t` is larger by
    :math:`\epsilon \sum a`. One iteration is an update of all :math:`\alpha` and then of all :math:`\beta`, in one
    read of the costs with one exponential per entry.

    Args:
        M: costs ``(..., n, m)``; float64, float32, bfloat16 or float16. +inf forbids a pair.
        a: weights of the rows ``(..., n)``, not negative, any floating dtype; default: uniform, of sum 1.
        b: weights of the columns ``(..., m)``, of the same sum as ``a`` to 1e-6 relative (they are scaled to it).
        reg: the regularisation, in the units of the costs.
        x, y: instead of ``M``: points ``(..., n, d)`` and ``(..., m, d)`` whose costs are their squared Euclidean
            distances; no matrix is stored.
        alpha0: row potentials ``(..., n)`` to start from, as those of an earlier result.
        tol: marginal error (below) to stop at.
        max_iter: iterations at most.
        n_len, m_len: integers ``(...)``: only the first rows and columns of a problem are in use. The rest may hold
            anything.

    Returns:
        An :class:`OTResult`; what it holds is float64, whatever the costs' dtype:

        - ``plan``: a :class:`DensePlan`, which is evaluated on demand and has ``to_dense()``, ``apply(v)`` and
          ``apply_transpose(v)``; constants, as are ``potentials`` (``alpha``, ``beta``; -inf where a weight is 0).
        - ``dual_value``: a lower bound of the optimum, up to rounding. ``value``: the objective of the plan rounded to
          both marginals (Altschuler, Weed and Rigollet 2017), an upper bound. ``gap`` = (``value`` -
          ``dual_value``) / (``reg`` sum a): the divergence of the rounded plan from T, summed without cancellation.
          Where rounding needs a forbidden pair, ``gap`` is infinite and ``value`` is the dual value.
        - ``marginal_err``: :math:`(\|T \mathbf 1 - a\|_1 + \|T^\top \mathbf 1 - b\|_1) / \|a\|_1`.
        - ``status``: "converged" only if ``marginal_err <= tol``; "iteration_limit"; "infeasible" for a row or column
          with mass and no finite cost (``value`` is inf); "invalid" for NaN, negative weights, or weights that do not
          sum alike, which on CPU are a ValueError instead.

    Raises:
        TypeError: an argument is no dense real floating-point tensor.
        ValueError: shapes that do not fit, ``reg`` not positive, or, on CPU, numbers that are not as above.

    Exponentials are float32 until the marginal error is 1e-6, or float32 no longer reduces it, and float64 from then
    on; potentials and sums over blocks are float64, and so is all that is reported. ``value`` can be
    differentiated once in ``M``, ``a``, ``b``, ``x`` and ``y``, by the envelope theorem: its derivatives are the
    plan, ``alpha`` and ``beta``, exact at the optimum. Those in ``a`` and ``b`` hold for changes that keep both sums
    equal; a zero weight's is -inf. O(n m d) operations per iteration; memory O(n + m) besides the inputs, on CPU
    a few dozen rows more.

    Sinkhorn distances: Cuturi 2013; absorption of the scalings into the potentials: Schmitzer 2019.

    Example:
        >>> import torch
        >>> from gradops.ot import entropic
        >>> result = entropic(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.5)
        >>> result.plan.to_dense()
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]], dtype=torch.float64)
    """
    costs = check_costs(M, x, y, "sqeuclidean")
    check_reg(reg)
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    n, m = costs.size
    weights = [None if w is None else w for w in (a, b, alpha0)]
    for w, name, size in zip(weights, ("a", "b", "alpha0"), (n, m, n), strict=True):
        if w is not None:
            check_weights(w, name, size, costs)
    for lengths, name in ((n_len, "n_len"), (m_len, "m_len")):
        if lengths is not None:
            check_integers(lengths, name)
            check_device(lengths, name, costs.tensors[0], "the costs")
    batch = torch.broadcast_shapes(costs.batch, *(w.shape[:-1] for w in weights if w is not None),
                                   *(t.shape for t in (n_len, m_len) if t is not None))
    costs = costs.expand(batch)
    lens = [None if t is None else t.expand(batch).long() for t in (n_len, m_len)]
    first = costs.tensors[0]
    full = [_weights(w, size, length, batch, first)
            for w, size, length in zip((a, b), (n, m), lens, strict=True)]
    if alpha0 is not None:
        alpha0 = alpha0.detach().double().expand(*batch, n)
    _look(costs, a, b, full, alpha0, lens, batch)
    left, right = (costs.M, None) if costs.M is not None else (costs.x, costs.y)
    value, alpha, beta, report = _entropic(left, right, *full, alpha0, *lens, float(reg), float(tol), int(max_iter))
    assert left is not None
    plan = DensePlan(left.detach(), None if right is None else right.detach(), alpha, beta, float(reg))
    return OTResult(plan=plan, value=value, dual_value=report[..., 0], gap=report[..., 1],
                    marginal_err=report[..., 2], ties=torch.zeros_like(report[..., 0], dtype=torch.int64),
                    potentials=(alpha, beta), n_iter=report[..., 3].long(), status=report[..., 4].long())


def _weights(w: Tensor | None, size: int, length: Tensor | None, batch: tuple[int, ...], like: Tensor) -> Tensor:
    """(*batch, size) in float64, 0 past a problem's length."""
    if length is None:
        if w is None:
            return torch.full((*batch, size), 1 / max(size, 1), dtype=torch.float64, device=like.device)
        return w.double().expand(*batch, size)
    used = torch.arange(size, device=like.device) < length.unsqueeze(-1)
    w = (1 / length.unsqueeze(-1)).double() if w is None else w.double()
    return torch.where(used, w, 0.0)


def _look(costs: Costs, a: Tensor | None, b: Tensor | None, full: list[Tensor], alpha0: Tensor | None,
          lens: list[Tensor | None], batch: tuple[int, ...]) -> None:
    """ValueErrors for numbers that make no sense, where looking at them costs no wait."""
    tensors = [*costs.tensors, *full]
    if not all(may_look(t) for t in tensors) or 0 in (*batch, *costs.size):
        return

    def refuse(bad: Tensor, text: str) -> None:
        if bad.any():
            where = f" in problem {tuple(bad.nonzero()[0].tolist())}" if bad.dim() else ""
            raise ValueError(text + where)

    for length, name, size in zip(lens, ("n_len", "m_len"), costs.size, strict=True):
        if length is not None:
            refuse((length < 0) | (length > size), f"{name} must be in [0, {size}], got a number outside")
    used = [w.new_ones(w.shape, dtype=torch.bool) if length is None
            else torch.arange(w.shape[-1]) < length.unsqueeze(-1) for w, length in zip(full, lens, strict=True)]
    for name, t in zip("Mxy", costs, strict=True):
        if t is None:
            continue
        t = t.detach()
        bad = t.amin((-2, -1)) if name == "M" else t.sum((-2, -1), dtype=torch.float64)
        bad = ~(bad > -torch.inf) if name == "M" else ~bad.isfinite()
        if bad.any() and any(length is not None for length in lens):  # only what is in use counts
            rows = used[1] if name == "y" else used[0]
            inside = rows.unsqueeze(-1) & used[1].unsqueeze(-2) if name == "M" else rows.unsqueeze(-1)
            wrong = ~(t > -torch.inf) if name == "M" else ~t.isfinite()
            bad = (wrong & inside).flatten(-2).any(-1)
        refuse(bad, f"{name} must not contain NaN or " + ("-inf" if name == "M" else "infinities") + ", which it does")
    for name, w in zip("ab", full, strict=True):
        w = w.detach()
        refuse(~((w >= 0) & (w < torch.inf)).all(-1), f"{name} must be finite and not negative, which it is not")
    sums = [w.detach().sum(-1) for w in full]
    apart = (sums[0] - sums[1]).abs() > _SAME_SUM * sums[0]
    if apart.any():
        i = tuple(apart.nonzero()[0].tolist())
        where = f" in problem {i}" if i else ""
        raise ValueError(f"a and b must have the same sum, got {sums[0][i].item():.9g} and "
                         f"{sums[1][i].item():.9g}{where}")
    if alpha0 is not None:
        refuse((alpha0.isnan() & used[0]).any(-1), "alpha0 must not contain NaN, which it does")


@torch.compiler.allow_in_graph
def _entropic(costs: Tensor, y: Tensor | None, a: Tensor, b: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if needs_derivative(*(t for t in (costs, y, a, b) if t is not None)):
        return _Entropic.apply(costs, y, a, b, *args)
    return _Entropic.forward(costs, y, a, b, *args)


class _Entropic(torch.autograd.Function):
    """The value, and the constants alpha, beta and the report."""

    generate_vmap_rule = True

    @staticmethod
    def forward(costs: Tensor, y: Tensor | None, a: Tensor, b: Tensor, alpha0: Tensor | None, n_len: Tensor | None,
                m_len: Tensor | None, reg: float, tol: float, max_iter: int) -> tuple[Tensor, ...]:
        mass, other = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
        alike = ((mass - other).abs() <= _SAME_SUM * mass) & (other > 0)
        alpha, beta, report = _op(costs, y, a, torch.where(alike, b * (mass / other), b), alpha0, n_len, m_len, reg,
                                  tol, max_iter)
        above = report[..., 1] * mass.squeeze(-1) * reg
        value = report[..., 0] + torch.where(above.isfinite(), above, 0.0)
        return value, alpha, beta, report

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        costs, y, a, b, _, n_len, m_len, ctx.reg, _, _ = inputs
        _, alpha, beta, report = output
        ctx.mark_non_differentiable(alpha, beta, report)
        ctx.save_for_backward(costs, y, a, b, alpha, beta, n_len, m_len)
        ctx.save_for_forward(costs, y, alpha, beta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_):
        # Where a graph of the gradient is made, it must lead to the inputs, to be refused there.
        twice = torch.is_grad_enabled() or forward_ad._current_level >= 0  # type: ignore[attr-defined]
        derivatives = _Gradient.apply if twice else _Gradient.forward
        return *derivatives(grad, *ctx.saved_tensors, ctx.reg), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, t_costs, t_y, t_a, t_b, *_):
        costs, y, alpha, beta = (None if t is None else primals([t])[0] for t in ctx.saved_tensors[:4])
        return _tangent(costs, y, alpha, beta, ctx.reg, t_costs, t_y, t_a, t_b), None, None, None


def _tangent(costs, y, alpha, beta, reg, t_costs, t_y, t_a, t_b) -> Tensor:
    total = alpha.new_zeros(alpha.shape[:-1])
    for potential, tangent in ((alpha, t_a), (beta, t_b)):
        if tangent is not None:
            total = total + torch.where(tangent == 0, 0.0, potential * tangent).sum(-1)
    plan = DensePlan(costs, y, alpha, beta, reg)
    if y is None:
        if t_costs is not None:
            for rows, t in plan.strips():
                total = total + (t * t_costs[..., rows, :]).sum((-1, -2))
        return total
    dx, dy = _point_gradients(plan)
    for gradient, tangent in ((dx, t_costs), (dy, t_y)):
        if tangent is not None:
            total = total + (gradient * tangent).sum((-1, -2))
    return total


def _point_gradients(plan: DensePlan) -> tuple[Tensor, Tensor]:
    """Of <T, C> in x and y, at fixed T: 2 sum_j t_ij (x_i - y_j), about the points' means, where nothing cancels."""
    assert plan.y is not None
    # A row without mass may hold anything.
    x = plan.costs.double().masked_fill((plan.alpha == -torch.inf).unsqueeze(-1), 0.0)
    y = plan.y.double().masked_fill((plan.beta == -torch.inf).unsqueeze(-1), 0.0)
    centre = y.mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    right = torch.cat([y, torch.ones_like(y[..., :1])], -1)
    left = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    to_x, to_y = plan.apply(right), plan.apply_transpose(left)
    return 2 * (x * to_x[..., -1:] - to_x[..., :-1]), 2 * (y * to_y[..., -1:] - to_y[..., :-1])


class _Gradient(torch.autograd.Function):
    """The gradient, which refuses to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, costs, y, a, b, alpha, beta, n_len, m_len, reg):
        plan = DensePlan(costs, y, alpha, beta, reg)
        grad = grad.unsqueeze(-1)
        if y is None:
            d_costs, d_y = (plan.to_dense() * grad.unsqueeze(-1)).to(costs.dtype), None
        else:
            d_costs, d_y = ((d * grad.unsqueeze(-1)).to(costs.dtype) for d in _point_gradients(plan))
        weights = []
        for potential, length in ((alpha, n_len), (beta, m_len)):
            if length is not None:
                unused = torch.arange(potential.shape[-1], device=potential.device) >= length.unsqueeze(-1)
                potential = potential.masked_fill(unused, 0.0)
            weights.append(potential * grad)
        return d_costs, d_y, *weights

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_):
        raise RuntimeError("the value of entropic has no second derivative")

    @staticmethod
    def jvp(ctx: Any, *_):
        raise RuntimeError("the value of entropic has no second derivative")
