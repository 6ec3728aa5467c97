import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradops.ot import DensePlan, entropic, reference
from gradops.ot.reference.entropic import _rounded as rounded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(*shape, seed=1):
    w = random(*shape, seed=seed) + 0.1
    return w / w.sum(-1, keepdim=True)


def distances(x, y):
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


REG = 1.0  # converges fast: the CUDA kernels are launched max_iter times whatever happens, which the emulator feels


def call(ops, costs, y, a, b, alpha0=None, n_len=None, m_len=None, reg=REG, tol=1e-10, max_iter=25):
    return ops.entropic(costs, y, a, b, alpha0, n_len, m_len, reg, tol, max_iter)


@pytest.mark.parametrize("n, m, dtype, points", [
    (9, 7, torch.float64, True), (9, 7, torch.float32, False), (9, 7, torch.bfloat16, False),
    (9, 7, torch.bfloat16, True), (9, 7, torch.float16, True), (20, 70, torch.float64, False),
    (20, 70, torch.float32, True), (1, 5, torch.float64, False), (4, 1, torch.float32, True)])
def test_matches_the_plain_twin(backend, n, m, dtype, points):
    device, ops = backend
    left, right = (random(n, 3), random(m, 3, seed=3)) if points else (random(n, m), None)
    left, right = left.to(device, dtype), None if right is None else right.to(device, dtype)
    a, b = weights(n).to(device), weights(m, seed=2).to(device)
    reg = 5.0
    alpha, beta, report = call(ops, left, right, a, b, reg=reg, max_iter=12)
    costs = distances(left.double(), right.double()) if points else left.double()
    want = reference.entropic(costs, a, b, reg=reg, tol=1e-12)
    assert report[4] == 0 and report[2] <= 1e-10
    # Near the optimum the dual value is flat: its error is the square of the potentials'.
    assert abs(report[0] - want.dual_value) < 1e-12
    plan = DensePlan(left, right, alpha, beta, reg).to_dense()
    torch.testing.assert_close(plan, want.plan.to_dense(), atol=1e-9, rtol=1e-7)
    assert abs(alpha.mean()) < 1e-12


@pytest.mark.parametrize("reg", [1.0, 0.05, 0.005])
def test_pot_has_the_same_plan(reg):
    pot = pytest.importorskip("ot")
    a, b, costs = weights(30), weights(40, seed=2), random(30, 40)
    want = pot.bregman.sinkhorn_log(a.numpy(), b.numpy(), costs.numpy(), reg, numItermax=20000, stopThr=1e-13)
    got = entropic(costs, a, b, reg=reg, tol=1e-12, max_iter=20000).plan.to_dense()
    np.testing.assert_allclose(got.numpy(), want, atol=1e-11)


@pytest.mark.parametrize("max_iter", [1, 3, 30])
def test_the_certificate_holds(backend, max_iter):
    device, ops = backend
    costs, a, b = random(20, 30).to(device), weights(20).to(device), weights(30, seed=2).to(device)
    alpha, beta, report = call(ops, costs, None, a, b, reg=0.03, tol=1e-13, max_iter=max_iter)
    t = DensePlan(costs, None, alpha, beta, 0.03).to_dense()
    assert report[3] == max_iter and report[4] == 1
    error = (t.sum(-1) - a).abs().sum() + (t.sum(-2) - b).abs().sum()
    torch.testing.assert_close(report[2], error, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(report[0], alpha @ a + beta @ b - 0.03 * t.sum(), rtol=1e-12, atol=1e-14)
    r = rounded(t, a, b)
    primal = (r * costs).sum() + 0.03 * (r * (r.log() - 1)).sum()
    torch.testing.assert_close(report[0] + 0.03 * report[1], primal, rtol=1e-10, atol=1e-13)
    best = reference.entropic(costs, a, b, reg=0.03, tol=1e-13, max_iter=3000).dual_value
    assert report[0] <= best + 1e-13 and best <= primal + 1e-13


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), reg=st.floats(1e-4, 10), max_iter=st.integers(1, 60),
       scale=st.sampled_from([1e-3, 1.0, 1e4]), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_converged_means_that_the_marginals_hold(n, m, reg, max_iter, scale, seed, dtype):
    costs = (random(n, m, seed=seed) * scale).to(dtype)
    a, b = weights(n, seed=seed), weights(m, seed=seed + 1)
    result = entropic(costs, a, b, reg=reg, max_iter=max_iter)
    t = result.plan.to_dense()
    error = (t.sum(-1) - a).abs().sum() + (t.sum(-2) - b).abs().sum()
    # potentials of 1e8 times reg are known to 1e-8 times reg: the plan is off by as much
    assert abs(error - result.marginal_err) < 1e-11 + 1e-15 * scale / reg
    assert (result.status == "converged") == (result.marginal_err.item() <= 1e-6)
    assert result.value >= result.dual_value or result.gap < 1e-10


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), reg=st.floats(1e-4, 0.1), max_iter=st.integers(1, 120),
       seed=st.integers(0, 2**31))
@example(n=8, m=11, reg=0.00214, max_iter=60, seed=65)
def test_the_last_step_is_plain(n, m, reg, max_iter, seed):
    # Stretched steps may throw the plan far from its marginals, and back; a plain one leaves the columns exact, in the
    # arithmetic of the exponentials: float32 with exponents up to 1 / reg.
    result = entropic(random(n, m, seed=seed), weights(n, seed=seed + 1), weights(m, seed=seed + 2), reg=reg, tol=0.0,
                      max_iter=max_iter)
    columns = result.plan.to_dense().sum(-2)
    torch.testing.assert_close(columns, weights(m, seed=seed + 2), atol=0, rtol=1e-3)
    assert result.marginal_err <= 2


def test_batch_item_equals_single(backend):
    device, ops = backend
    costs, a, b = random(3, 12, 17).float().to(device), weights(3, 12).to(device), weights(3, 17).to(device)
    batch = call(ops, costs, None, a, b, tol=1e-6, max_iter=10)
    for i in range(3):
        for got, want in zip(call(ops, costs[i], None, a[i], b[i], tol=1e-6, max_iter=10), batch, strict=True):
            assert torch.equal(got, want[i])


@pytest.mark.parametrize("points", [False, True])
def test_ragged(backend, points):
    device, ops = backend
    n_len, m_len = torch.tensor([9, 4], device=device), torch.tensor([5, 13], device=device)
    left, right = (random(2, 9, 2), random(2, 13, 2, seed=1)) if points else (random(2, 9, 13), None)
    left, right = left.float().to(device), right.float().to(device) if points else None
    a, b = torch.full((2, 9), torch.nan), torch.full((2, 13), torch.nan)
    for i in range(2):
        a[i, : n_len[i]], b[i, : m_len[i]] = 1 / n_len[i], 1 / m_len[i]
        left[i, n_len[i]:] = torch.nan
        (right if points else left.mT)[i, m_len[i]:] = torch.nan
    a, b = a.double().to(device), b.double().to(device)
    alpha, beta, report = call(ops, left, right, a, b, None, n_len, m_len, tol=1e-6, max_iter=10)
    for i in range(2):
        n, m = int(n_len[i]), int(m_len[i])
        args = (left[i, :n], right[i, :m]) if points else (left[i, :n, :m], None)
        want = call(ops, *args, a[i, :n], b[i, :m], tol=1e-6, max_iter=10)
        assert torch.equal(alpha[i, :n], want[0]) and torch.equal(beta[i, :m], want[1])
        assert torch.equal(report[i], want[2])
        assert (alpha[i, n:] == -torch.inf).all() and (beta[i, m:] == -torch.inf).all()
    plan = DensePlan(left, right, alpha, beta, REG).to_dense()
    assert (plan[0, :, 5:] == 0).all() and (plan[1, 4:] == 0).all()
    assert abs(plan.sum() - 2) < 1e-5


def test_zero_weights_and_forbidden_pairs(backend):
    device, ops = backend
    costs, a, b = random(8, 6).float(), weights(8), weights(6, seed=2)
    a[2] = b[4] = 0
    a, b = a / a.sum(), b / b.sum()
    costs[0, 1] = costs[5, 0] = costs[5, 3] = torch.inf
    alpha, beta, report = call(ops, costs.to(device), None, a.to(device), b.to(device))
    alpha, beta, report = alpha.cpu(), beta.cpu(), report.cpu()
    plan = DensePlan(costs, None, alpha, beta, REG).to_dense()
    assert report[4] == 0 and alpha[2] == beta[4] == -torch.inf
    assert (plan[2] == 0).all() and (plan[:, 4] == 0).all() and plan[0, 1] == plan[5, 0] == 0
    torch.testing.assert_close(plan.sum(-1), a, atol=1e-10, rtol=0)
    torch.testing.assert_close(plan.sum(-2), b, atol=1e-10, rtol=0)


def test_a_bad_problem_fails_alone(backend):
    device, ops = backend
    costs, a, b = random(6, 5, 4).float(), weights(6, 5), weights(6, 4, seed=2)
    limits = {"tol": 1e-6, "max_iter": 10}
    want = [t[5] for t in call(ops, costs.to(device), None, a.to(device), b.to(device), **limits)]
    costs[0, 2] = torch.inf  # a row without a pair
    costs[1, :, 1] = torch.inf  # a column
    costs[2, 1, 1] = torch.nan
    costs[3, 1, 1] = -torch.inf
    b[4] *= 2
    alpha, _, report = call(ops, costs.to(device), None, a.to(device), b.to(device), **limits)
    assert report[:, 4].tolist() == [4, 4, 5, 5, 5, 0]
    assert alpha[:5].isnan().all() and report[:5, :3].isnan().all()
    assert torch.equal(alpha[5], want[0]) and torch.equal(report[5], want[2])


def test_warm_start(backend):
    device, ops = backend
    costs, a, b = (t.to(device) for t in (random(15, 12).float(), weights(15), weights(12, seed=2)))
    cold = call(ops, costs, None, a, b, reg=0.2, tol=1e-6)
    warm = call(ops, costs, None, a, b, cold[0], reg=0.2, tol=1e-6)
    assert cold[2][4] == warm[2][4] == 0 and warm[2][3] <= 4 < cold[2][3]
    torch.testing.assert_close(warm[0], cold[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("far", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("reg", [1.0, 0.01, 0.001])
def test_the_iterates_are_those_of_the_log_domain(reg, far):
    # A start far away: scalings of 2^43000, rows and columns whose sums leave the range of float, weights below it
    costs, a, b = random(70, 40).float(), weights(70), weights(40, seed=2)
    costs[:, 7] += far
    b[11] = 1e-45
    b /= b.sum()
    alpha0 = far * random(70, seed=4)
    for max_iter in (1, 2, 4):
        got, want = (f(costs, a, b, reg=reg, alpha0=alpha0, tol=0.0, max_iter=max_iter)
                     for f in (entropic, reference.entropic))
        # float exponents of up to some 2^15, known to 2^-22 or to their last bits
        torch.testing.assert_close(got.plan.to_dense(), want.plan.to_dense(), atol=1e-6 * a.max(), rtol=1e-5)


def test_a_kernel_too_large_to_be_kept():
    # Rows of the kernel take 16 places. The same rows again and again: a small problem, whose kernel is kept
    costs, b = random(2**16, 2).float(), weights(2)
    few, many = (entropic(costs.repeat(times, 1), torch.full((times * 2**16,), 2**-16), b * times, reg=0.5, tol=0.0,
                          max_iter=3) for times in (1, 17))
    torch.testing.assert_close(many.potentials.beta, few.potentials.beta, atol=1e-6, rtol=0)
    torch.testing.assert_close(many.marginal_err, few.marginal_err, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reg", [0.1, 0.001])
def test_shifted_and_scaled_costs(reg):
    costs, a, b = random(40, 50), weights(40), weights(50, seed=2)
    base = entropic(costs, a, b, reg=reg, tol=1e-11, max_iter=20000)
    shifted = entropic(costs - 3, a, b, reg=reg, tol=1e-11, max_iter=20000)
    torch.testing.assert_close(shifted.value, base.value - 3, atol=1e-12, rtol=0)
    scaled = entropic(costs * 1e6, a, b, reg=reg * 1e6, tol=1e-11, max_iter=20000)
    torch.testing.assert_close(scaled.potentials.alpha, base.potentials.alpha * 1e6, atol=1e-2 * reg, rtol=1e-6)
    assert base.status == shifted.status == scaled.status == "converged"


def test_the_public_function_and_its_twin_agree():
    x, y = random(2, 9, 3), random(2, 7, 3, seed=1)
    for options in ({}, {"n_len": torch.tensor([9, 5]), "m_len": torch.tensor([4, 7])}):
        got, want = (f(x=x, y=y, reg=0.1, tol=1e-12, **options) for f in (entropic, reference.entropic))
        torch.testing.assert_close(got.value, want.value, atol=1e-12, rtol=0)
        torch.testing.assert_close(got.plan.to_dense(), want.plan.to_dense(), atol=1e-11, rtol=0)
        assert got.status == want.status == ["converged", "converged"]


@pytest.mark.parametrize("reg", [0.1, 0.01, 0.003])
def test_stretched_steps_take_fewer_iterations(reg):
    costs, a, b = random(30, 40), torch.full((30,), 1 / 30).double(), torch.full((40,), 1 / 40).double()
    result = entropic(costs, reg=reg, max_iter=20000)
    plain = reference.entropic(costs, a, b, reg=reg, max_iter=600).n_iter
    assert result.status == "converged" and result.n_iter <= (20 if reg == 0.1 else plain / 3)


def test_the_number_of_threads_changes_nothing():
    costs = random(400, 300).float()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(entropic(costs, reg=0.01))
    finally:
        torch.set_num_threads(threads)
    one, two = results
    assert torch.equal(one.potentials.alpha, two.potentials.alpha) and torch.equal(one.gap, two.gap)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 4), (2, 0, 0)])
def test_empty(shape):
    result = entropic(torch.ones(shape), torch.full(shape[-2:-1], 1.0 if shape[-1] else 0.0))
    assert result.value.shape == shape[:-2] and result.plan.to_dense().shape == shape


def test_strided_and_broadcast_input():
    costs, a = random(20, 30), weights(20)
    want = entropic(costs[::2, ::3].clone(), weights(10), reg=0.1)
    got = entropic(costs[::2, ::3], weights(10), reg=0.1)
    assert torch.equal(got.value, want.value)
    many = entropic(costs.expand(3, 20, 30), torch.stack([a, a, a]), reg=0.1)
    assert torch.equal(many.value, entropic(costs, a, reg=0.1).value.expand(3)) and many.plan.shape == (3, 20, 30)


def test_plan_without_a_matrix():
    x, y, v = random(2, 9, 3), random(2, 7, 3, seed=1), random(2, 7, 4)
    plan = entropic(x=x, y=y, reg=0.1).plan
    dense = plan.to_dense()
    torch.testing.assert_close(plan.apply(v), dense @ v)
    torch.testing.assert_close(plan.apply_transpose(dense @ v), dense.mT @ dense @ v)


def test_gradients():
    def value(costs, s, t):
        return entropic(costs, s.softmax(-1), t.softmax(-1), reg=0.3, tol=1e-13).value

    costs, s, t = (r.requires_grad_() for r in (random(2, 3, 2), random(2, 3, seed=2), random(2, seed=3)))
    assert torch.autograd.gradcheck(value, (costs, s, t), check_forward_ad=True, check_batched_grad=True)

    def of_points(x, y):
        return entropic(x=x, y=y, reg=0.3, tol=1e-13).value

    x, y = random(3, 2).requires_grad_(), random(4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(of_points, (x, y), check_forward_ad=True)
    grad, = torch.autograd.grad(of_points(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_gradients_of_ragged_problems_with_rubbish_outside():
    x, y = random(2, 4, 3), random(2, 5, 3, seed=1)
    x[1, 2:] = torch.nan
    x.requires_grad_()
    value = entropic(x=x, y=y, reg=0.3, n_len=torch.tensor([4, 2])).value
    grad, = torch.autograd.grad(value.sum(), x)
    assert (grad[1, 2:] == 0).all() and grad.isfinite().all()
    part = x[1, :2].detach().requires_grad_()
    want, = torch.autograd.grad(entropic(x=part, y=y[1], reg=0.3).value, part)
    torch.testing.assert_close(grad[1, :2], want)


def test_bad_input():
    costs = torch.rand(2, 3, 4)
    with pytest.raises(TypeError, match="M must be a torch.Tensor, got ndarray"):
        entropic(np.ones((2, 2)))
    with pytest.raises(ValueError, match="reg must be positive"):
        entropic(costs, reg=0.0)
    with pytest.raises(ValueError, match="max_iter must be an integer >= 1"):
        entropic(costs, max_iter=0)
    with pytest.raises(ValueError, match="tol must not be negative"):
        entropic(costs, tol=float("nan"))
    with pytest.raises(ValueError, match=r"a must have shape \(\.\.\., 3\)"):
        entropic(costs, torch.ones(4))
    with pytest.raises(ValueError, match=r"a and b must have the same sum, got 3 and 8 in problem \(0,\)"):
        entropic(costs, torch.ones(3), 2 * torch.ones(4))
    with pytest.raises(ValueError, match=r"b must be finite and not negative, got -1"):
        entropic(costs, torch.ones(3), torch.tensor([-1.0, 2, 1, 1]))
    with pytest.raises(ValueError, match=r"n_len must be in \[0, 3\]"):
        entropic(costs, n_len=torch.tensor([2, 4]))
    costs[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"M must not hold NaN or -inf in problem \(1,\)"):
        entropic(costs)
    costs[1] = torch.nan  # nothing but NaN looks as if nothing were allowed
    with pytest.raises(ValueError, match=r"M must not hold NaN or -inf in problem \(1,\)"):
        entropic(costs)
    x, y = torch.full((3, 2), torch.nan), torch.ones(4, 2)
    for points in ((x, y), (y, x)):
        with pytest.raises(ValueError, match="x and y must not hold NaN"):
            entropic(None, x=points[0], y=points[1])
    assert entropic(torch.full((3, 4), torch.inf)).status == "infeasible"
