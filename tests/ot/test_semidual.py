import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.ot import SparsePlan, reference, semidual

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXACT = 2e-13  # everything is finished in float64, whatever the costs' dtype; sums of hundreds of terms


def problem(n, m, *, batch=(), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    M = torch.rand(*batch, n, m, generator=g, dtype=torch.float64).to(dtype)
    alpha = torch.randn(*batch, n, generator=g, dtype=torch.float64) * 0.1
    a = torch.rand(*batch, n, generator=g, dtype=torch.float64).softmax(-1)
    b = torch.rand(*batch, m, generator=g, dtype=torch.float64).softmax(-1)
    return alpha, M, a, b


def same(out, want, tolerance=EXACT):
    for ours, theirs in zip((out[0], out[1], out[3], out[2].to_dense()),
                            (want[0], want[1], want[3], want[2].to_dense()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def raw(ops, device, alpha, M, a, b, reg, k, *, points=(None, None), warm=(None,) * 4, width=None):
    def put(t):
        return None if t is None else t.to(device)

    n = alpha.shape[-1]
    k = n if k is None else min(k, n)
    value, grad, index, weight, tau, kept = (
        t.cpu() for t in ops.semidual(put(alpha), put(M), *map(put, points), put(a), put(b), reg, k, width or k,
                                      *map(put, warm)))
    assert ((weight > 0).sum(-1) <= k).all() and (kept <= k).all()
    return value, grad, SparsePlan(index, weight, (*alpha.shape, b.shape[-1])), tau


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m, k, reg", [(1, 4, 1, 1.0), (5, 1, 2, 0.1), (30, 70, 3, 5.0), (67, 33, None, 0.5),
                                          (40, 9, 16, 100.0), (12, 40, 12, 2.0)])
def test_matches_float64(backend, n, m, k, reg, dtype):
    device, ops = backend
    alpha, M, a, b = problem(n, m, batch=(2,), dtype=dtype)
    out = raw(ops, device, alpha, M, a, b, reg, k)
    same(out, reference.semidual(alpha, M.double(), a, b, reg, k))
    again = alpha + 0.02 * torch.randn_like(alpha)
    warm = (alpha, out[2].indices, out[2].values, out[3])
    same(raw(ops, device, again, M, a, b, reg, k, warm=warm), reference.semidual(again, M.double(), a, b, reg, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 40])
def test_points_match_their_costs(backend, d, dtype):
    device, ops = backend
    alpha, _, a, b = problem(50, 70)
    x, y = (torch.randn(size, d, dtype=torch.float64).to(dtype) + 30 for size in (50, 70))
    want = reference.semidual(alpha, None, a, b, 2.0, 4, x=x.double(), y=y.double())
    same(raw(ops, device, alpha, None, a, b, 2.0, 4, points=(x, y)), want, 1e-12)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), m=st.integers(1, 200), k=st.sampled_from([None, 1, 2, 5, 40]), seed=st.integers(0, 99),
       reg=st.sampled_from([1e-3, 0.3, 50.0]), dtype=st.sampled_from(DTYPES), offset=st.sampled_from([0.0, 1e4]))
def test_any_shape_and_any_start(n, m, k, reg, seed, dtype, offset):
    alpha, M, a, b = problem(n, m, seed=seed, dtype=dtype)
    alpha = alpha + offset
    out = semidual(alpha, M, a, b, reg, k)
    tolerance = EXACT * (1 + 10 * offset)
    same(out, reference.semidual(alpha, M.double(), a, b, reg, k), tolerance)
    g = torch.Generator().manual_seed(seed)
    w = min(n, 3)
    rubbish = SparsePlan(torch.randint(-2, n + 2, (m, w), generator=g),
                         torch.randn(m, w, generator=g, dtype=torch.float64) * 10, (n, m))
    earlier = semidual(alpha + 0.1 * torch.randn(n, generator=g, dtype=torch.float64), M, a, b, reg, k)
    for state in ((alpha, out[2], out[3]), (alpha, earlier[2], earlier[3]), (-alpha, rubbish, out[3] + 100),
                  (alpha, rubbish, torch.full_like(out[3], torch.nan))):
        warm = semidual(alpha, M, a, b, reg, k, warm=state)
        assert all(torch.equal(x, y) for x, y in zip((warm[1], warm[3], warm[2].to_dense()),
                                                     (out[1], out[3], out[2].to_dense()), strict=True))


@pytest.mark.parametrize("n, m", [(200, 70), (90, 1100), (1000, 130)])
def test_a_start_from_far_off(n, m):
    """Its thresholds let too many entries through: the scan by them is given up on the way, and made anew."""
    alpha, M, a, b = problem(n, m, dtype=torch.float32)
    for k in (4, None):
        out = semidual(alpha, M, a, b, 0.3, k)
        for shift in (-1e3, 1e3, 1e9):
            warm = semidual(alpha, M, a, b, 0.3, k, warm=(alpha + shift, out[2], out[3] - shift))
            same(warm, out, 0)


def test_columns_sum_to_b_and_hold_few(backend):
    device, ops = backend
    alpha, M, a, b = problem(300, 40, dtype=torch.float32)
    for k in (1, 7, None):
        plan = raw(ops, device, alpha + 1e3, M, a, b, 1e-2, k)[2]
        torch.testing.assert_close(plan.values.sum(-1), b, rtol=1e-14, atol=0)


def test_ties_go_to_the_lowest_rows(backend):
    device, ops = backend
    n, m = 40, 35
    a, b = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
    M = torch.ones(n, m)
    M[:4] = 2
    alpha = torch.zeros(n, dtype=torch.float64)
    plan = raw(ops, device, alpha, M, a, b, 1.0, 3)[2]
    assert (plan.indices == torch.tensor([4, 5, 6])).all()
    torch.testing.assert_close(plan.values, torch.full_like(plan.values, 1 / m / 3))


def test_no_mass_no_entries_and_nothing_allowed(backend):
    device, ops = backend
    alpha, M, a, b = problem(20, 40, dtype=torch.float32)
    b[3] = b[30] = 0
    M[:, 5], b[5] = torch.inf, 0
    M[2:, 7] = torch.inf
    M[::2, 9] = torch.inf
    value, grad, plan, tau = raw(ops, device, alpha, M, a, b, 0.5, 4)
    dense = plan.to_dense()
    assert (dense[:, [3, 30, 5]] == 0).all() and tau[5] == -torch.inf and (dense[torch.inf == M] == 0).all()
    torch.testing.assert_close(tau[[3, 30]], (alpha[:, None] - M.double())[:, [3, 30]].amax(0))
    torch.testing.assert_close(dense.sum(0), b, rtol=1e-14, atol=0)
    finite = [j for j in range(40) if j != 5]
    want = reference.semidual(alpha, M[:, finite].double(), a, b[finite], 0.5, 4)
    torch.testing.assert_close((value, grad), (want[0], want[1]), rtol=EXACT, atol=EXACT)
    b[5] = 0.1
    value, _, _, tau = raw(ops, device, alpha, M, a, b, 0.5, 4)
    assert value == torch.inf and tau[5] == -torch.inf


def test_supports_wider_than_the_lists():
    alpha, M, a, b = problem(1500, 70, dtype=torch.float32)
    out = semidual(alpha, M, a, b, 1e4)  # every entry is positive
    same(out, reference.semidual(alpha, M.double(), a, b, 1e4))
    equal = torch.zeros(1500, 70)  # all entries tie
    same(semidual(alpha * 0, equal, a, b, 1.0, 5), reference.semidual(alpha * 0, equal.double(), a, b, 1.0, 5))


def test_batch_items_equal_single_problems_for_any_number_of_threads(backend):
    device, ops = backend
    alpha, M, a, b = problem(40, 70, batch=(3,), dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(raw(ops, device, alpha, M, a, b, 3.0, 4))
    finally:
        torch.set_num_threads(threads)
    single = [raw(ops, device, alpha[i], M[i], a[i], b[i], 3.0, 4) for i in range(3)]
    for result in results:
        for i in range(3):
            assert torch.equal(result[0][i], single[i][0]) and torch.equal(result[1][i], single[i][1])
            assert torch.equal(result[2].values[i], single[i][2].values) and torch.equal(result[3][i], single[i][3])


def test_a_large_problem_has_the_same_bits_for_any_number_of_threads():
    alpha, M, a, b = problem(60, 2500, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            value, grad, plan, tau = semidual(alpha, M, a, b, 3.0, 4)
            results.append((value, grad, plan.values, tau))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for r in results for x, y in zip(r, results[0], strict=True))


def test_broadcast_strides_and_dtypes():
    alpha, M, a, b = problem(9, 12, batch=(2,))
    want = reference.semidual(alpha, M, a[0].float().double().expand(2, 9), b, 1.0, 3)
    out = semidual(alpha, M.mT.contiguous().mT, a[0].float(), b, 1.0, 3)
    same(out, want)
    assert all(t.dtype == torch.float64 for t in (out[0], out[1], out[3], out[2].values))
    empty = semidual(torch.zeros(0, 3), torch.zeros(0, 3, 4), torch.ones(3), torch.ones(4), 1.0, 2)
    assert empty[0].shape == (0,) and empty[2].to_dense().shape == (0, 3, 4)


def test_plan_formats():
    alpha, M, a, b = problem(9, 12, batch=(2,))
    plan = semidual(alpha, M, a, b, 1.0, 3)[2]
    dense = plan.to_dense()
    torch.testing.assert_close(plan.to_torch_sparse().to_dense(), dense)
    with pytest.raises(ValueError, match="to_csr needs the plan of one problem"):
        plan.to_csr()
    csr = SparsePlan(plan.indices[1], plan.values[1], plan.shape[1:]).to_csr()
    torch.testing.assert_close(csr.to_dense(), dense[1])
    assert csr.values().numel() == (dense[1] > 0).sum()


@pytest.mark.parametrize("k", [1, 3, None])
def test_derivatives(k):
    alpha, M, a, b = (t.requires_grad_() for t in problem(6, 5))

    def f(alpha, M, a, b):
        value, grad, plan, tau = semidual(alpha, M, a, b, 0.3, k)
        return value, grad, plan.values, tau

    assert torch.autograd.gradcheck(f, (alpha, M, a, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *args: f(*args)[0], (alpha, M, a, b))
    value, grad, plan, tau = semidual(alpha, M, a, b, 0.3, k)
    envelope = torch.autograd.grad(value, (alpha, M, a, b))
    for ours, want in zip(envelope, (grad, plan.to_dense(), alpha, -tau), strict=True):
        torch.testing.assert_close(ours, want)
    same(semidual(*(t.detach() for t in (alpha, M, a, b)), 0.3, k),
         [t.detach() if isinstance(t, torch.Tensor) else SparsePlan(t.indices, t.values.detach(), t.shape)
          for t in (value, grad, plan, tau)])


def test_derivatives_in_points():
    alpha, _, a, b = problem(6, 5)
    x, y = (torch.randn(size, 2, dtype=torch.float64, requires_grad=True) for size in (6, 5))
    assert torch.autograd.gradcheck(lambda x, y: semidual(alpha, None, a, b, 0.5, 3, x=x, y=y)[0], (x, y))


@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_matches_pot(k, dtype, tolerance, capsys):
    smooth = pytest.importorskip("ot.smooth")
    tensors = problem(30, 20)
    alpha, M, a, b = (t.numpy() for t in tensors)
    regularization = smooth.SquaredL2(0.7) if k is None else smooth.SparsityConstrained(k, 0.7)
    value, grad = smooth.semi_dual_obj_grad(alpha, a, b, M, regularization)
    capsys.readouterr()  # it prints
    out = semidual(tensors[0], tensors[1].to(dtype), tensors[2], tensors[3], 0.7, k)
    assert abs(out[0].item() - value) <= tolerance
    np.testing.assert_allclose(out[1], grad, atol=tolerance)
    plan = smooth.get_plan_from_semi_dual(alpha, b, M, regularization)
    np.testing.assert_allclose(out[2].to_dense(), plan, atol=tolerance)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_costs_that_are_no_numbers(backend, bad):
    device, ops = backend
    alpha, M, a, b = problem(20, 40, batch=(3,), dtype=torch.float32)
    M[1, 3, 4] = bad
    if ops is torch.ops.gradops and device == "cpu":
        with pytest.raises(ValueError, match="M must hold finite costs, or .* got NaN or -inf in item 1"):
            raw(ops, device, alpha, M, a, b, 1.0, 3)
        return
    value, grad, _, _ = raw(ops, device, alpha, M, a, b, 1.0, 3)
    assert value[1].isnan() and grad[1].isnan().all()
    assert value[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


def test_bad_input():
    alpha, M, a, b = problem(4, 5)
    with pytest.raises(TypeError, match="M must be a torch.Tensor, got ndarray"):
        semidual(alpha, M.numpy(), a, b, 1.0)
    with pytest.raises(ValueError, match="the costs must be given either as M or as points x and y"):
        semidual(alpha, None, a, b, 1.0)
    with pytest.raises(ValueError, match="metric must be one of 'sqeuclidean', got 'euclidean'"):
        semidual(alpha, M, a, b, 1.0, metric="euclidean")
    with pytest.raises(ValueError, match=r"b must have shape \(..., 5\) for costs of 4 x 5, got \(4,\)"):
        semidual(alpha, M, a, a, 1.0)
    with pytest.raises(ValueError, match="reg must be positive and finite, got 0"):
        semidual(alpha, M, a, b, 0.0)
    with pytest.raises(ValueError, match="max_nz must be an integer >= 1, got 0"):
        semidual(alpha, M, a, b, 1.0, 0)
    with pytest.raises(ValueError, match="b must be finite and not negative, got -1"):
        semidual(alpha, M, a, -torch.ones(5), 1.0)
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        semidual(alpha * torch.nan, M, a, b, 1.0)
    with pytest.raises(ValueError, match="width must be at least 4, the entries of the plan's fullest column, got 2"):
        semidual(alpha, M, a, b, 1e3, width=2)
    out = semidual(alpha, M, a, b, 1.0)
    with pytest.raises(ValueError, match=r"the plan of warm must have shape \(5, 4\), got \(4, 5\)"):
        semidual(b, M.mT, b, a, 1.0, warm=(b, out[2], out[3][:4]))
