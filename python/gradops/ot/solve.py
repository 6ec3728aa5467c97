"""Sparse optimal transport, solved and certified."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_number, check_one_of, may_look
from .._compiler import allow_in_graph
from .._op import needs_derivative, refuse_derivative, register
from ._derivatives import Numbers, differentiable
from ._problem import check_max_nz, check_reg, check_weights, whole_problem
from .result import OTResult, Potentials
from .sparse_plan import SparsePlan

GAP_TO_TOL = 1e-3  # the value converges faster than the marginals
_REPORT, _EVALUATIONS, _WIDEST = 11, 5, 10  # numbers of a TransportReport, and the places of two of them


def _fake(M, x, y, a, b, alpha0, n_len, m_len, reg, max_nz, tol, gap_tol, max_iter, width, averaged):
    index = b.new_empty(*b.shape, width, dtype=torch.int64)
    return (torch.empty_like(a, memory_format=torch.contiguous_format),
            torch.empty_like(b, memory_format=torch.contiguous_format), index,
            index.new_empty(index.shape, dtype=torch.float64), a.new_empty(*a.shape[:-1], _REPORT))


raw_solve = register("solve", fake=_fake)


def solve(
    M: Tensor | None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: float = 1.0,
    max_nz: int | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    alpha0: Tensor | None = None,
    tol: float = 1e-6,
    max_iter: int = 1000,
    method: str = "auto",
    n_len: Tensor | None = None,
    m_len: Tensor | None = None,
    plan_kind: str = "sparse",
) -> OTResult:
    r"""Solves quadratically regularised optimal transport, and proves how well.

    .. math:: \min_T\; \langle T, M\rangle + \tfrac{\gamma}{2}\|T\|^2 \quad\text{subject to}\quad
        T \ge 0,\; T\mathbf{1} = a,\; T^\top\mathbf{1} = b

    with :math:`\gamma` = ``reg``, and with ``max_nz`` at most that many entries in every column of T. Plans are sparse:
    the smaller ``reg``, the sparser.

    Without ``max_nz`` the semi-dual is maximised by damped semismooth Newton steps, whose linear systems are Laplacians
    of the plan's sparse graph, along a path of falling ``reg``. It says ``"converged"`` only if the marginals hold to
    ``tol`` and a plan rounded onto both marginals proves the value to ``tol / 1000``. Entries agree with
    :math:`(\alpha_i + \beta_j - M_{ij})_+ / \gamma` to 5e-6 of the largest ``b``, beyond the rounding of potentials.

    With ``max_nz`` the semi-dual of the constraint (Liu, Puigcerver and Blondel 2023) has kinks. It is smoothed by a
    quadratic term on the conjugate, half the squared k-support norm, around the last plan (the proximal point method)
    and maximised by Newton steps, again and again. Its maximum is that of the convex relaxation: below the natural
    support (the widest column of the quadratic plan) the plan with ``max_nz`` entries per column in general misses the
    rows, by ``marginal_err``, however long one solves, and the status is ``"stagnated"``. Of a column's tied entries it
    takes those with the largest weights in the relaxation's plan. ``value`` is then the relaxation's at a feasible
    plan: no potentials of any method have a dual value above it, so ``gap`` says how far the dual is from its maximum;
    not how far the plan is from the best sparse one. ``"converged"`` means that the rows hold: from the natural support
    on, where the answer is the quadratic one, and wherever the relaxation is exact, as for ``max_nz=1`` on assignment
    problems.

    Costs may have any scale and any offset: every test is free of both. All arithmetic that decides is float64,
    whatever the costs' dtype; costs themselves are taken as they are, exactly.

    Args:
        M: ``(..., n, m)``, costs; float64, float32, bfloat16 or float16. ``+inf`` where nothing may be moved. None: the
            costs are the squared distances of ``x`` and ``y``, never stored.
        a, b: ``(..., n)`` and ``(..., m)``, weights of rows and columns, not negative. Sums must agree to 1e-5; ``b``
            is scaled to the sum of ``a``. Rows and columns without weight leave the problem. Default: uniform, with the
            sum of the other, or 1.
        reg: weight of the quadratic term, positive.
        max_nz: the most entries of a column; None or any number from n on: no bound.
        x, y: points ``(..., n, d)`` and ``(..., m, d)`` of one dtype, instead of ``M``.
        alpha0: ``(..., n)``, potentials of the rows to start from, as of a problem nearby. Used where they violate
            marginals by less than 30 %.
        tol: the error of the row marginals that counts as none, relative to the mass.
        max_iter: the most evaluations of the dual, per problem.
        method: ``"auto"``.
        n_len, m_len: ``(...)``, integers: problem i is only the first ``n_len[i]`` rows and ``m_len[i]`` columns of its
            costs; what is outside is not read, and is 0 in the results.
        plan_kind: with ``max_nz``, ``"sparse"``: never more entries per column, rows up to ``marginal_err``; or
            ``"averaged"``: the plan of the relaxation, which nearly meets the rows, with more entries in some columns.
            See the guide to sparse transport.

    Returns:
        An `OTResult` with plan, value, dual value, gap, error of the marginals, potentials and status per problem.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit; ``reg``, ``tol``, ``max_nz`` or ``max_iter`` is out of range; on CPU also: a
            weight is negative or not finite, sums of weights differ, costs hold NaN or ``-inf``, a length is out of
            range. On CUDA those problems are ``"invalid"`` and NaN instead.

    A masked problem (``+inf`` costs) is found infeasible if a row or a column with mass has no finite cost; without
    ``max_nz`` also if some rows have more mass than all the columns that they can reach, by more than ``tol`` of the
    whole (Hall's condition). With ``max_nz`` such a problem ends as ``"stagnated"`` or ``"iteration_limit"``.

    Differentiable in ``M``, ``x``, ``y``, ``a`` and ``b``, in both modes. ``value`` and ``dual_value`` by the envelope
    theorem: their gradient is the plan in ``M``, ``alpha`` in ``a`` and ``beta`` in ``b``, where only changes that keep
    the sums alike mean anything. ``plan.values`` with the support held, to any order: exact without ``max_nz`` where no
    entry is about to enter or leave (elsewhere a one-sided derivative). With ``max_nz`` the plan's derivative is that
    of a quadratic plan on its support: a heuristic at ties, and wherever the marginals do not hold. Values have second
    derivatives in the costs. Potentials, quality and averaged plans have no derivative: an error in reverse mode, NaN
    in forward mode. A plan's derivative is on the CPU only.

    Semi-dual and path: Blondel, Seguy and Rolet (2018); Newton: Lorenz, Manns and Meyer (2021), here with the damping
    of Levenberg and Marquardt; rounding: Altschuler, Weed and Rigollet (2017, Algorithm 2). POT: ``ot.smooth``. Near
    the solution an iteration takes time in the order of the plan's entries; the costs are read again only for columns
    whose candidates may have changed.

    Example:
        >>> import torch
        >>> from gradops.ot import solve
        >>> M = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]])
        >>> result = solve(M, reg=1.0)
        >>> result.plan.to_dense().round(decimals=4)
        tensor([[0.3333, 0.0000, 0.0000],
                [0.0000, 0.3333, 0.0000],
                [0.0000, 0.0000, 0.3333]], dtype=torch.float64)
        >>> result.status, round(float(result.value), 4)
        ('converged', 0.1667)
    """
    costs, a, b, lengths = whole_problem(M, a, b, x, y, n_len, m_len)
    refuse_derivative("solve", alpha0=alpha0)
    n, m = costs.size
    check_reg(reg)
    check_max_nz(max_nz)
    check_one_of(method, "method", ("auto",))
    check_one_of(plan_kind, "plan_kind", ("sparse", "averaged"))
    check_number(tol, "tol")
    if not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, got {tol}")
    check_count(max_iter, "max_iter")
    if alpha0 is not None:
        check_weights(alpha0, "alpha0", n, costs)
        alpha0 = alpha0.to(torch.float64).expand(a.shape)
    most = 0 if max_nz is None or max_nz >= n else max_nz

    known = all(may_look(t) for t in (a, b, *costs.tensors))
    averaged = plan_kind == "averaged" and most > 0
    slots = max(min(n, 4 * most + 16 if known else n) if averaged else most or (min(n, 64) if known else n), 1)
    alpha, beta, index, weight, value, dual_value, gap, marginal_err, ties, n_iter, status = _solve(
        *costs, a, b, alpha0, *lengths, float(reg), most, float(tol), max_iter, slots, averaged,
        known and (averaged or not most))
    return OTResult(SparsePlan(index, weight, (*a.shape[:-1], n, m)), value, dual_value, gap, marginal_err, ties,
                    Potentials(alpha, beta), n_iter, status)


@allow_in_graph
def _solve(M: Tensor | None, x: Tensor | None, y: Tensor | None, a: Tensor, b: Tensor, alpha0: Tensor | None,
           n_len: Tensor | None, m_len: Tensor | None, reg: float, max_nz: int, tol: float, max_iter: int, slots: int,
           averaged: bool, may_widen: bool) -> Numbers:
    def run(M: Any, x: Any, y: Any, a: Tensor, b: Tensor, alpha0: Any, n_len: Any, m_len: Any) -> Numbers:
        def numbers(width: int, start: Tensor | None) -> tuple[Tensor, ...]:
            *found, report = raw_solve(M, x, y, a, b, start, n_len, m_len, reg, max_nz, tol, tol * GAP_TO_TOL, max_iter,
                                       width, averaged)
            return *found, *report.unbind(-1)

        alpha, beta, index, weight, *report = numbers(slots, alpha0)
        if may_widen and (count := report[_WIDEST]).numel():
            widest = int(max(float(count.max()), 1))  # -inf without columns
            if widest > slots:  # from its solution it takes an evaluation or two
                evaluations = report[_EVALUATIONS]
                alpha, beta, index, weight, *report = numbers(widest, alpha)
                report[_EVALUATIONS] = report[_EVALUATIONS] + evaluations
            else:
                index, weight = index[..., :widest], weight[..., :widest]
        value, dual_value, gap, marginal_err, ties, n_iter, status, *_ = report
        return alpha, beta, index, weight, value, dual_value, gap, marginal_err, ties, n_iter.long(), status.long()

    inputs = (M, x, y, a, b, alpha0, n_len, m_len)
    if needs_derivative(*(t for t in inputs[:5] if t is not None)):
        return differentiable(run, reg, averaged, *inputs)
    return run(*inputs)
