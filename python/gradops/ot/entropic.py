"""Entropic optimal transport: Sinkhorn's iterations."""
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._checks import check_count, check_number, may_look
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, primals, register
from ._problem import Costs, check_reg, check_weights, inside, whole_problem
from .dense_plan import DensePlan
from .result import STATUS, OTResult, Potentials


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

    and :math:`\epsilon` = ``reg``. The plan is :math:`t_{ij} = \exp((\alpha_i + \beta_j - c_{ij}) / \epsilon)`, as
    of POT's ``ot.sinkhorn(a, b, M, reg)``; POT's objective :math:`\epsilon \sum t \log t` is larger by
    :math:`\epsilon \sum a`. One iteration is an update of all :math:`\alpha` and then of all :math:`\beta`, as in
    the log domain. On CPU that is two multiplications by a kernel, in one read; its exponentials are made again only
    where potentials have moved too far from those that it was made with.

    Args:
        M: costs ``(..., n, m)``; float64, float32, bfloat16 or float16. +inf forbids a pair.
        a, b: weights of rows ``(..., n)`` and columns ``(..., m)``, not negative, any floating dtype. Sums must
            agree to 1e-5; ``b`` is scaled to the sum of ``a``. Default: uniform, with the sum of the other, or 1.
        reg: the regularisation, in the units of the costs.
        x, y: instead of ``M``: points ``(..., n, d)`` and ``(..., m, d)`` whose costs are their squared Euclidean
            distances.
        alpha0: row potentials ``(..., n)`` to start from, as those of an earlier result.
        tol: marginal error (below) to stop at.
        max_iter: iterations at most.
        n_len, m_len: integers ``(...)``: only the first rows and columns of a problem are in use. The rest may hold
            anything.

    Returns:
        An :class:`OTResult`; what it holds is float64, whatever the costs' dtype:

        - ``plan``: a :class:`DensePlan`, which is evaluated on demand and has ``to_dense()``, ``apply(v)`` and
          ``apply_transpose(v)``; a constant, as are ``potentials`` (``alpha``, of mean 0, and ``beta``; -inf where a
          weight is 0 or a length cuts off).
        - ``dual_value``: a lower bound of the optimum, up to rounding. ``value``: the objective of the plan rounded to
          both marginals (Altschuler, Weed and Rigollet 2017), an upper bound. ``gap`` = (``value`` -
          ``dual_value``) / (``reg`` sum a): the divergence of the rounded plan from T, summed without cancellation.
          Where rounding needs a forbidden pair, ``gap`` is infinite and ``value`` is the dual value.
        - ``marginal_err``: :math:`(\|T \mathbf 1 - a\|_1 + \|T^\top \mathbf 1 - b\|_1) / \|a\|_1`.
        - ``status``: "converged" only if ``marginal_err <= tol``; "iteration_limit"; "infeasible" for a row or column
          with mass and no finite cost; "invalid" for NaN, negative weights, or weights that do not sum alike, which on
          CPU are a ValueError instead. NaN everywhere in the last two.

    Raises:
        TypeError: an argument is no dense real floating-point tensor.
        ValueError: shapes that do not fit, ``reg`` not positive, or, on CPU, numbers that are not as above.

    Exponentials are float32 until the marginal error is 1e-6, or float32 no longer reduces it, and float64 from then
    on; potentials and sums over blocks are float64, and so is all that is reported. Steps are stretched by
    over-relaxation at the measured rate of convergence: 2 to 13 times fewer iterations where many are needed. That is
    taken back where it does not pay, and the last steps are plain. ``value`` can be differentiated once in ``M``,
    ``a``, ``b``, ``x`` and ``y``, by the envelope theorem: its derivatives are the plan, ``alpha`` and ``beta``, exact
    at the optimum. Those in ``a`` and ``b`` hold for changes that keep both sums equal; a zero weight's is -inf.
    O(n m) operations per iteration, O(n m d) where exponentials are made. Memory O(n + m) besides the inputs; on CPU
    also 8 n m bytes for the kernel, of points too, if n m is at most 2**24 (of larger problems every iteration makes
    exponentials). A batch of problems of n m <= 2**18 takes that once per thread, of larger ones once.

    Sinkhorn distances: Cuturi 2013; absorption of the scalings into the potentials: Schmitzer 2019; over-relaxation:
    Thibault, Chizat, Dossal and Papadakis 2021, Lehmann et al. 2022.

    Example:
        >>> import torch
        >>> from gradops.ot import entropic
        >>> result = entropic(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.5)
        >>> result.plan.to_dense()
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]], dtype=torch.float64)
    """
    costs, a, b, lengths = whole_problem(M, a, b, x, y, n_len, m_len)
    n, m = costs.size
    check_reg(reg)
    check_number(tol, "tol")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    check_count(max_iter, "max_iter")
    if alpha0 is not None:
        check_weights(alpha0, "alpha0", n, costs)
        alpha0 = alpha0.detach().to(torch.float64).expand(a.shape)
    for length, name, size in zip(lengths, ("n_len", "m_len"), (n, m), strict=True):
        if length is not None and may_look(length) and ((length < 0) | (length > size)).any():
            raise ValueError(f"{name} must be in [0, {size}], got {length.tolist()}")
    left, right = (costs.M, None) if costs.M is not None else (costs.x, costs.y)
    assert left is not None
    value, alpha, beta, report = _entropic(left, right, a, b, alpha0, *lengths, float(reg), float(tol), int(max_iter))
    dual_value, gap, marginal_err, n_iter, code = report.unbind(-1)
    if may_look(code) and (code >= STATUS.index("infeasible")).any():
        wrong = (code == STATUS.index("invalid")) | ((code == STATUS.index("infeasible")) & _nan(costs, a, b, lengths))
        if wrong.any():
            raise ValueError(_fault(tuple(wrong.nonzero()[0].tolist()), costs, a, b, alpha0, lengths))
    plan = DensePlan(left.detach(), None if right is None else right.detach(), alpha, beta, float(reg))
    return OTResult(plan, value, dual_value, gap, marginal_err, torch.zeros_like(dual_value), Potentials(alpha, beta),
                    n_iter.to(torch.int64), code.to(torch.int64))


def _nan(costs: Costs, a: Tensor, b: Tensor, lengths: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Whether a cost that counts is NaN. Of a column of nothing else a solver only sees that nothing is finite."""
    rows, columns = (
        (w > 0) if length is None else (w > 0) & (torch.arange(w.shape[-1], device=w.device) < length[..., None])
        for w, length in zip((a, b), lengths, strict=True))
    if costs.M is not None:
        return (costs.M.isnan() & rows[..., None] & columns[..., None, :]).any(-1).any(-1)
    assert costs.x is not None and costs.y is not None
    return (costs.x.isnan().any(-1) & rows).any(-1) | (costs.y.isnan().any(-1) & columns).any(-1)


def _fault(item: tuple[int, ...], costs: Costs, a: Tensor, b: Tensor, alpha0: Tensor | None,
           lengths: tuple[Tensor | None, Tensor | None]) -> str:
    """What is wrong with the numbers of one problem."""
    n, m = (size if t is None else int(t[item]) for t, size in zip(lengths, costs.size, strict=True))
    where = f" in problem {item}" if item else ""
    weights = a[item][:n].detach(), b[item][:m].detach()
    for name, w in zip("ab", weights, strict=True):
        if not ((w >= 0) & (w < torch.inf)).all():
            return f"{name} must be finite and not negative, got {w[~((w >= 0) & (w < torch.inf))][0]:.9g}{where}"
    sums = [w.sum().item() for w in weights]
    if abs(sums[0] - sums[1]) > 1e-5 * sums[0]:
        return f"a and b must have the same sum, got {sums[0]:.9g} and {sums[1]:.9g}{where}"
    if alpha0 is not None and not (alpha0[item][:n][weights[0] > 0] < torch.inf).all():
        return f"alpha0 must be below infinity and not NaN{where}"
    return f"{'M' if costs.M is not None else 'x and y'} must not hold NaN or -inf{where}"


@allow_in_graph
def _entropic(costs: Tensor, y: Tensor | None, a: Tensor, b: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if needs_derivative(*(t for t in (costs, y, a, b) if t is not None)):
        return _Entropic.apply(costs, y, a, b, *args)
    return _Entropic.forward(costs, y, a, b, *args)


class _Entropic(Function):
    """The value, and the constants alpha, beta and the report."""

    generate_vmap_rule = True

    @staticmethod
    def forward(costs: Tensor, y: Tensor | None, a: Tensor, b: Tensor, alpha0: Tensor | None, n_len: Tensor | None,
                m_len: Tensor | None, reg: float, tol: float, max_iter: int) -> tuple[Tensor, ...]:
        alpha, beta, report = _op(costs, y, a, b, alpha0, n_len, m_len, reg, tol, max_iter)
        above = report[..., 1] * inside(a, a.shape[-1], n_len).sum(-1) * reg
        value = torch.where(above == torch.inf, report[..., 0], report[..., 0] + above)
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
        args = grad, *ctx.saved_tensors, ctx.reg
        return *(_Gradient.apply(*args) if twice else _Gradient.forward(*args)), *(None,) * 6

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


class _Gradient(Function):
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
