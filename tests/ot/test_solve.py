import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_array

from gradops.ot import reference, solve

COSTS, WEIGHTS = ("gauss", "uniform", "clustered"), ("uniform", "random", "zero")


def costs(kind, n, m, seed=0, batch=()):
    g = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.rand(*batch, n, m, generator=g, dtype=torch.float64)
    x, y = (torch.randn(*batch, k, 2, generator=g, dtype=torch.float64) for k in (n, m))
    if kind == "clustered":
        centres = torch.randn(5, 2, generator=g, dtype=torch.float64)
        x, y = (centres[torch.randint(5, p.shape[:-1], generator=g)] + 0.05 * p for p in (x, y))
    M = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return M / M.amax((-2, -1), keepdim=True)


def weights(kind, n, seed=0):
    g = torch.Generator().manual_seed(seed + 100)
    w = torch.ones(n, dtype=torch.float64)
    if kind != "uniform":
        w = torch.rand(n, generator=g, dtype=torch.float64) + 0.01
    if kind == "zero":
        w = w * (torch.rand(n, generator=g) > 0.2)
        w[0] = 1
    return w / w.sum()


def assert_solved(result, M, a, b, reg, tol=1e-6, gap=1e-8):
    """Optimality, from the plan and the potentials alone: feasible, and the dual's value is the primal's."""
    M, a, b = M.double(), a.double(), b.double()
    assert result.status == "converged", result
    plan, mass = result.plan.to_dense(), a.sum()
    assert (plan >= 0).all()
    assert (plan.sum(-2) - b).abs().max() <= 1e-14 * b.max()
    assert (plan.sum(-1) - a).abs().sum() <= tol * mass
    alpha, beta = result.potentials
    excess = (alpha[:, None] + beta - M).clamp(min=0)
    dual = alpha @ a + beta @ b - excess.square().sum() / (2 * reg)
    used = plan > 0
    primal = (plan * M)[used].sum() + reg / 2 * plan.square().sum()
    low, high = M[M.isfinite()].min(), M[M.isfinite()].max()
    scale = primal - low * mass
    rounding = 1e-13 * (low.abs() * mass + scale) + 1e-16 * high.abs() * mass  # values are sums of numbers like costs
    missing = (plan.sum(-1) - a).abs() @ alpha.abs()
    assert abs(primal - dual) <= gap * scale + missing + rounding
    assert abs(result.dual_value - dual) <= gap * scale + rounding
    assert result.value - result.dual_value >= -rounding
    assert result.value - result.dual_value <= gap * scale + rounding
    assert float(result.gap) <= gap
    torch.testing.assert_close(excess / reg, plan, rtol=0, atol=float(1e-5 * b.max() + rounding / reg))


def check(kind, weight, n, m, reg, dtype=torch.float32, seed=0):
    M, a, b = costs(kind, n, m, seed).to(dtype), weights(weight, n, seed), weights(weight, m, seed + 1)
    assert_solved(solve(M, a, b, reg=reg), M, a, b, reg, gap=1e-9 if dtype == torch.float64 else 1e-8)


@pytest.mark.parametrize("reg", [10, 1, 0.1, 0.01])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", COSTS)
def test_converges(kind, weight, reg):
    check(kind, weight, 40, 56, reg)
    check(kind, weight, 64, 64, reg, torch.float64, 1)


@pytest.mark.slow
@pytest.mark.parametrize("n, m", [(64, 64), (256, 256), (512, 512), (1024, 32), (32, 1024)])
@pytest.mark.parametrize("reg", [10, 1, 0.1, 0.01])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", COSTS)
def test_the_whole_table(kind, weight, reg, n, m):
    for seed in range(2 if n * m <= 256**2 else 1):
        for dtype in (torch.float32, torch.float64):
            check(kind, weight, n, m, reg, dtype, seed)


def test_is_the_reference():
    M, a, b = costs("gauss", 12, 15), weights("random", 12), weights("random", 15, 1)
    for reg in (3.0, 0.1):
        plan = reference.solve(M, a, b, reg=reg, tol=1e-9).plan.to_dense()
        torch.testing.assert_close(solve(M, a, b, reg=reg).plan.to_dense(), plan, rtol=0, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), reg=st.sampled_from([5.0, 0.3, 1e-3]), seed=st.integers(0, 99),
       kind=st.sampled_from(COSTS), weight=st.sampled_from(WEIGHTS),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_any_shape(n, m, reg, seed, kind, weight, dtype):
    check(kind, weight, n, m, reg, dtype, seed)


@pytest.mark.parametrize("n, m", [(1, 7), (7, 1), (1, 1), (3, 400), (400, 3)])
def test_narrow(n, m):
    check("gauss", "random", n, m, 0.2)


@pytest.mark.parametrize("scale, shift", [(1e-9, 0.0), (1e9, 0.0), (1.0, -5.0), (1.0, 1e6), (1e-3, 1.0)])
def test_scale_and_shift_of_the_costs(scale, shift):
    M, a, b = costs("gauss", 30, 40), weights("random", 30), weights("random", 40, 1)
    want = solve(M, a, b, reg=0.1)
    changed = M * scale + shift
    result = solve(changed, a, b, reg=0.1 * scale)
    exact = changed - shift  # with the rounding of the shift
    assert result.status == "converged"
    assert float(result.gap) <= 1e-9 + 1e-15 * abs(shift / scale)
    error = 10 * float((exact / scale - M).abs().max()) / 0.1 + 1e-8
    torch.testing.assert_close(result.plan.to_dense(), want.plan.to_dense(), rtol=0, atol=error)
    error = 1e-8 + 1e-9 * abs(shift / scale)
    torch.testing.assert_close((result.value - shift) / scale, want.value, rtol=0, atol=error)


def test_mass_scales_along():
    M, a, b = costs("gauss", 30, 40), weights("random", 30), weights("random", 40, 1)
    want, result = solve(M, a, b, reg=0.1), solve(M, 1e6 * a, 1e6 * b, reg=1e-7)
    torch.testing.assert_close(result.plan.to_dense() / 1e6, want.plan.to_dense(), rtol=0, atol=1e-9)


def test_ties():
    M = (torch.arange(12)[:, None] - torch.arange(12)).square().double()
    assert_solved(solve(M, reg=0.5), M, weights("uniform", 12), weights("uniform", 12), 0.5)
    flat = torch.ones(6, 9)
    result = solve(flat, reg=2.0)
    assert result.status == "converged"
    torch.testing.assert_close(result.plan.to_dense(), torch.full((6, 9), 1 / 54, dtype=torch.float64))


def whole_numbers(seed=0, n=64, m=128):
    return torch.randint(4, (n, m), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("reg", [10, 1, 0.1])
def test_an_optimum_next_to_the_least_cost(reg):
    """Whole numbers as costs leave mass nearly nothing to pay: rounding hides more than 1e-9 of that."""
    M, a, b = whole_numbers(), weights("random", 64), weights("random", 128, 1)
    result = solve(M, a, b, reg=reg)
    assert result.status == "converged" and result.marginal_err <= 1e-6 and result.n_iter < 60
    assert 0 <= result.value - result.dual_value + 1e-15 <= 1e-12 * 3


def test_stops_where_rounding_decides():
    M, a, b = whole_numbers(), weights("random", 64), weights("random", 128, 1)
    result = solve(M, a, b, reg=1e-13)  # 1e-3 of an entry is the last bit of a potential
    assert result.status == "stalled" and result.n_iter < 200
    torch.testing.assert_close((result.plan.to_dense().sum(-1) - a).abs().sum(), result.marginal_err)


@pytest.mark.parametrize("reg", [1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("kind", ["gauss", "uniform", "whole numbers"])
def test_plan_is_not_as_rough_as_the_potentials(kind, reg):
    """The optimum of linear programming, where the potentials' rounding alone would move 1e-5 of the mass."""
    n, m = 64, 128
    M = whole_numbers() if kind == "whole numbers" else costs(kind, n, m)
    a, b = weights("random", n), weights("random", m, 1)
    result = solve(M, a, b, reg=reg)
    plan = result.plan.to_dense()
    assert result.status == "converged" and result.marginal_err <= 1e-9
    torch.testing.assert_close((plan.sum(-1) - a).abs().sum(), result.marginal_err, rtol=0.01, atol=1e-14)
    entry = np.arange(n * m)
    sums = csr_array((np.ones(2 * n * m), (np.r_[entry // m, n + entry % m], np.r_[entry, entry])))
    least = linprog(M.flatten().numpy(), A_eq=sums, b_eq=torch.cat([a, b]).numpy()).fun
    assert abs(float((plan * M).sum()) - least) <= reg / 2 * float(b.square().sum()) + 1e-9 * least + 1e-13


@pytest.mark.parametrize("kind, n, m", [("gauss", 40, 300), ("clustered", 128, 128), ("uniform", 200, 90)])
def test_next_to_unregularised(kind, n, m):
    M = costs(kind, n, m, 1)
    result = solve(M, reg=1e-4)
    assert_solved(result, M, *(torch.full((k,), 1 / k, dtype=torch.float64) for k in (n, m)), 1e-4)
    assert result.n_iter < 300


def bumps(size, seed):
    """Weights of a picture of a few soft spots: down to 1e-60 of the largest."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.cartesian_prod(*[torch.arange(size, dtype=torch.float64)] * 2)
    at, width = torch.rand(3, 2, generator=g) * size, size * (0.05 + 0.15 * torch.rand(3, generator=g))
    w = torch.exp(-torch.cdist(pixels, at.double()).square() / (2 * width.double() ** 2)).sum(1)
    return w / w.sum(), pixels


@pytest.mark.parametrize("reg", [10, 1, 0.1, 0.01])
@pytest.mark.parametrize("case", ["histogram", "picture", "power"])
def test_weights_of_many_sizes(case, reg):
    """Next to nothing weighs next to nothing: neither such rows nor whole components of them may lead a step astray."""
    if case == "histogram":  # POT's first example
        x = torch.arange(100, dtype=torch.float64)
        a, b = (torch.exp(-((x - mean) / scale).square() / 2) for mean, scale in ((20, 5), (60, 10)))
        a, b, M = a / a.sum(), b / b.sum(), (x[:, None] - x).square()
        M = M / M.max()
    elif case == "picture":
        (a, pixels), (b, _) = bumps(12, 0), bumps(12, 1)
        M = torch.cdist(pixels, pixels).square()
        M = M / M.max()
    else:
        M, a, b = costs("gauss", 120, 90), weights("random", 120).pow(8), weights("random", 90, 1).pow(8)
        a, b = a / a.sum(), b / b.sum()
    result = solve(M, a, b, reg=reg)
    assert_solved(result, M, a, b, reg)
    assert result.n_iter < 400


def test_zero_weights_keep_potentials_of_the_dual():
    M, a, b = costs("gauss", 20, 25), weights("zero", 20), weights("zero", 25, 1)
    result = solve(M, a, b, reg=0.1)
    alpha, beta = result.potentials
    slack = M - alpha[:, None] - beta
    assert alpha.isfinite().all() and beta.isfinite().all()
    assert (slack[a == 0] >= -1e-12).all() and (slack[:, b == 0] >= -1e-12).all()  # they stay empty
    assert (slack[a == 0][:, b > 0].amin(1).abs() <= 1e-12).all()  # and are as large as that allows


def test_masked_costs():
    M, a, b = costs("gauss", 24, 30), weights("random", 24), weights("random", 30, 1)
    M[torch.rand(24, 30, generator=torch.Generator().manual_seed(0)) < 0.3] = torch.inf
    result = solve(M, a, b, reg=0.5)
    assert result.status == "converged"
    assert_solved(result, M, a, b, 0.5)
    blocks = torch.full((8, 8), torch.inf)  # two problems that do not know of each other
    blocks[:4, :4] = blocks[4:, 4:] = costs("uniform", 4, 4).float()
    assert_solved(solve(blocks, reg=0.1), blocks, weights("uniform", 8), weights("uniform", 8), 0.1)


def test_infeasible():
    M = costs("gauss", 5, 6)
    for broken in (torch.index_fill(M, 0, torch.tensor([2]), torch.inf),
                   torch.index_fill(M, 1, torch.tensor([3]), torch.inf)):
        result = solve(torch.stack([M, broken]), reg=0.5)
        assert result.status == ["converged", "infeasible"]
        assert result.value[1].isnan() and result.potentials.alpha[1].isnan().all()
        assert torch.equal(result.plan.to_dense()[0], solve(M, reg=0.5).plan.to_dense())
    lopsided = torch.full((2, 2), torch.inf)  # row 0 needs column 0, and so does row 1
    lopsided[:, 0] = 1
    lopsided[0, 1] = 1
    assert solve(lopsided, torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5]), reg=1.0).status == "infeasible"


@pytest.mark.parametrize("power", [1, 8])
def test_infeasible_is_what_no_flow_satisfies(power):
    """Masked costs, judged by the largest flow that the mask lets through."""
    seen = set()
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        n, m = (int(torch.randint(2, 25, (1,), generator=g)) for _ in range(2))
        a, b = (torch.rand(k, generator=g, dtype=torch.float64).pow(power) for k in (n, m))
        a, b = a / a.sum(), b / b.sum()
        M = torch.rand(n, m, generator=g, dtype=torch.float64)
        M[torch.rand(n, m, generator=g) < 0.4] = torch.inf
        rows, cols = (p.numpy() for p in M.isfinite().nonzero(as_tuple=True))
        incidence = np.zeros((n + m, len(rows)))
        incidence[rows, np.arange(len(rows))] = incidence[n + cols, np.arange(len(rows))] = 1
        flow = linprog(-np.ones(len(rows)), A_ub=incidence, b_ub=torch.cat([a, b]).numpy())
        missing = 1 + flow.fun
        assert missing < 1e-9 or missing > 1e-5  # or tolerances decide
        result = solve(M, a, b, reg=10.0 ** float(torch.randint(-3, 3, (1,), generator=g)))
        assert result.status == ("converged" if missing < 1e-9 else "infeasible")
        seen.add(result.status)
    assert len(seen) == 2


@pytest.mark.parametrize("seed", range(4))
def test_rounding_is_not_infeasible(seed):
    M, a, b = costs("gauss", 90, 70, seed), weights("random", 90, seed), weights("random", 70, seed + 1)
    result = solve(M, a, b, reg=0.1, tol=1e-18)  # nothing reaches that
    assert result.status == "stalled" and result.marginal_err < 1e-6


@pytest.mark.parametrize("n", [5, 80])  # lists of all rows, lists from a scan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_that_only_a_row_without_mass_can_reach(n, dtype):
    M, a = costs("uniform", n, n).to(dtype), torch.ones(n)
    M[1:, 2] = torch.inf
    a[0] = 0
    assert solve(M, a / a.sum(), reg=0.5).status == "infeasible"


def test_never_claims_what_it_did_not_reach():
    M = costs("clustered", 60, 60)
    for limit in (1, 3, 10):
        result = solve(M, reg=0.01, max_iter=limit)
        assert result.status == "iteration_limit" and int(result.n_iter) <= limit + 2
        plan = result.plan.to_dense()
        error = (plan.sum(1) - 1 / 60).abs().sum()
        torch.testing.assert_close(result.marginal_err, error, rtol=1e-9, atol=1e-13)
        assert result.dual_value <= solve(M, reg=0.01).value <= result.value


def test_batch_item_equals_single():
    M = costs("gauss", 30, 20, batch=(2, 3)).float()
    a, b = torch.stack([weights("random", 30, s) for s in range(3)]), weights("zero", 20)
    result = solve(M, a, b, reg=0.2)
    assert result.plan.shape == (2, 3, 30, 20) and result.status == [["converged"] * 3] * 2
    for i in range(2):
        for j in range(3):
            one = solve(M[i, j], a[j], b, reg=0.2)
            assert torch.equal(result.plan.to_dense()[i, j], one.plan.to_dense())
            assert torch.equal(result.potentials.alpha[i, j], one.potentials.alpha)
            assert torch.equal(result.value[i, j], one.value) and torch.equal(result.n_iter[i, j], one.n_iter)


@pytest.mark.parametrize("points", [False, True])
def test_ragged_equals_trimmed(points):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 20, 2, generator=g), torch.randn(3, 25, 2, generator=g)
    M = torch.cdist(x, y).square()
    n_len, m_len = torch.tensor([20, 11, 1]), torch.tensor([17, 25, 6], dtype=torch.int32)
    for i in range(3):
        M[i, n_len[i] :], M[i, :, m_len[i] :] = torch.nan, torch.nan
    given = {"x": x, "y": y} if points else {}
    result = solve(None if points else M, **given, reg=0.3, n_len=n_len, m_len=m_len)
    for i in range(3):
        n, m = int(n_len[i]), int(m_len[i])
        given = {"x": x[i, :n], "y": y[i, :m]} if points else {}
        one = solve(None if points else M[i, :n, :m], **given, reg=0.3)
        plan = result.plan.to_dense()[i]
        assert torch.equal(plan[:n, :m], one.plan.to_dense()) and (plan > 0).sum() == (plan[:n, :m] > 0).sum()
        assert torch.equal(result.potentials.alpha[i, :n], one.potentials.alpha)
        assert (result.potentials.alpha[i, n:] == 0).all() and (result.potentials.beta[i, m:] == 0).all()
        assert result.status[i] == "converged"


def test_points_are_their_distances():
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    M = (x[:, None] - y).square().sum(-1)
    result, want = solve(None, x=x, y=y, reg=1.0), solve(M, reg=1.0)
    assert result.status == "converged"
    torch.testing.assert_close(result.plan.to_dense(), want.plan.to_dense(), rtol=0, atol=1e-10)


def test_warm_start():
    M, a, b = costs("gauss", 50, 60), weights("random", 50), weights("random", 60, 1)
    cold = solve(M, a, b, reg=0.1)
    warm = solve(M, a, b, reg=0.1, alpha0=cold.potentials.alpha + 3)
    assert warm.status == "converged" and int(warm.n_iter) <= 4 < int(cold.n_iter)
    moved = solve(M + 0.001 * torch.rand(50, 60), a, b, reg=0.1, alpha0=cold.potentials.alpha)
    assert moved.status == "converged" and moved.n_iter < cold.n_iter
    for bad in (torch.zeros(50), 100 * torch.randn(50)):
        assert_solved(solve(M, a, b, reg=0.1, alpha0=bad), M, a, b, 0.1)


def test_threads_change_no_bit():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1100, 2, generator=g)
    M = torch.cdist(x, torch.randn(1000, 2, generator=g)).square()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(solve(M / M.max(), reg=10.0))
    finally:
        torch.set_num_threads(threads)
    for r in results[1:]:
        assert torch.equal(r.potentials.alpha, results[0].potentials.alpha)
        assert torch.equal(r.plan.values, results[0].plan.values) and torch.equal(r.value, results[0].value)


def test_empty_and_strided():
    result = solve(torch.zeros(0, 3, 4), reg=1.0)
    assert result.plan.to_dense().shape == (0, 3, 4) and result.status == []
    M = costs("gauss", 20, 30).float()
    want = solve(M, reg=0.5).plan.to_dense()
    assert torch.equal(solve(M.T.contiguous().T, reg=0.5).plan.to_dense(), want)
    both = solve(M.expand(2, 20, 30), reg=0.5).plan.to_dense()
    assert torch.equal(both[0], want) and torch.equal(both[1], want)


def test_bad_input():
    M, third = torch.rand(2, 3, 4), torch.full((3,), 1 / 3)
    for match, error, call in (
        ("M must be a torch.Tensor, got ndarray", TypeError, lambda: solve(np.ones((2, 2)))),
        ("M must be float64", TypeError, lambda: solve(torch.ones(2, 2, dtype=torch.int64))),
        ("either as M or as points", ValueError, lambda: solve(None)),
        ("a must have shape", ValueError, lambda: solve(M, torch.ones(4))),
        ("b must have shape", ValueError, lambda: solve(M, None, torch.ones(3))),
        ("reg must be positive", ValueError, lambda: solve(M, reg=0.0)),
        ("max_nz must be an integer >= 1", ValueError, lambda: solve(M, max_nz=0)),
        ("tol must be between", ValueError, lambda: solve(M, tol=0.0)),
        ("max_iter must be an integer >= 1", ValueError, lambda: solve(M, max_iter=0)),
        ("method must be one of", ValueError, lambda: solve(M, method="fast")),
        ("plan_kind must be one of", ValueError, lambda: solve(M, plan_kind="dense")),
        ("alpha0 must have shape", ValueError, lambda: solve(M, alpha0=torch.ones(4))),
        ("n_len must be int32 or int64", TypeError, lambda: solve(M, n_len=torch.ones(2))),
        (r"n_len must be in \[0, 3\], got 4 in item 1", ValueError, lambda: solve(M, n_len=torch.tensor([3, 4]))),
        ("b must sum to", ValueError, lambda: solve(M, third, torch.ones(4))),
        ("a must be finite and not negative, got -1.0", ValueError,
         lambda: solve(M, torch.tensor([1.0, -1.0, 1.0]), torch.full((4,), 0.25))),
        ("M must hold finite costs, or .inf where nothing may be moved, got NaN or -inf in item 1", ValueError,
         lambda: solve(torch.stack([M[0], M[0] * torch.nan]))),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("n, m", [(0, 5), (0, 0)])
def test_no_rows_take_no_mass(n, m):
    result = solve(torch.rand(n, m))
    assert result.status == "converged" and result.value == 0 and result.plan.to_dense().shape == (n, m)


def test_nothing_to_move():
    assert solve(torch.rand(5, 6), torch.zeros(5), torch.zeros(6)).status == "converged"
    lengths = torch.tensor([3, 0]), torch.tensor([4, 4])
    result = solve(torch.rand(2, 5, 6), n_len=lengths[0], m_len=lengths[1])
    assert result.status == ["converged"] * 2 and result.value[1] == 0
