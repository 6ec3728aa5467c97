import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import one_token_rollout_loss, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# exp and log within 1.5 ulp, sums of at most 2048 numbers in the type, the rest in float64
ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of the gradient
SMALL = {torch.float64: 1e-15, torch.float32: 2e-7, torch.bfloat16: 2e-7, torch.float16: 2e-7}  # p and q cancel
SEEDS = torch.tensor([3, -5, 2**62, 8, 9, 10, 11])


def make(shape, dtype=torch.float64, device="cpu", scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, dtype=torch.float64, generator=g)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=g)
    return logits.to(device, dtype), targets.to(device)


def exact(logits, targets, **settings):
    """Loss and gradient by autograd of the formula in float64."""
    z = logits.double().clone().requires_grad_()
    loss = reference.one_token_rollout_loss(z, targets, reduction="none", **settings)
    grad, = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (7, 33), (2, 3, 2049), (1, 9000), (0, 5), (5,)])
def test_matches_float64(backend, shape, dtype):
    device, ops = backend
    logits, targets = make(shape, dtype, device)
    before = logits.clone()
    for temperature, beta in ((1.5, -0.1), (0.7, 0.3)):
        loss, state, samples = ops.one_token_rollout(logits, targets, None, temperature, beta, 0)
        grad = ops.one_token_rollout_backward(logits, targets, samples, state, torch.ones_like(loss), temperature, beta)
        want, want_grad = exact(logits, targets, temperature=temperature, beta=beta)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == want.shape
        assert (loss - want).abs().max() <= ERROR[dtype] * (1 + want.abs().max()) if loss.numel() else True
        assert grad.dtype == dtype and torch.equal(logits, before)
        torch.testing.assert_close(grad.double(), want_grad, rtol=ROUNDING[dtype], atol=2 * SMALL[dtype])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 4), cols=st.integers(1, 200), scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
       dtype=st.sampled_from(DTYPES), temperature=st.floats(0.5, 4), beta=st.floats(-0.5, 1), seed=st.integers(0, 99))
def test_any_input(rows, cols, scale, dtype, temperature, beta, seed):
    logits, targets = make((rows, cols), dtype, scale=scale, seed=seed)
    loss = one_token_rollout_loss(logits, targets, temperature=temperature, beta=beta, reduction="none")
    want, _ = exact(logits, targets, temperature=temperature, beta=beta)
    torch.testing.assert_close(loss.double(), want, rtol=3 * ERROR[dtype], atol=3 * ERROR[dtype])


def test_temperature_one_is_dynamic_fine_tuning_times_one_minus_beta():
    logits, targets = make((6, 50))
    z = logits.clone().requires_grad_()
    ours, = torch.autograd.grad(one_token_rollout_loss(z, targets, temperature=1.0, beta=-0.3, reduction="sum"), z)
    logp = z.log_softmax(-1).gather(-1, targets[:, None])
    dft, = torch.autograd.grad(-(logp.exp().detach() * logp).sum(), z)
    torch.testing.assert_close(ours, 1.3 * dft)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sampled_form_is_the_formula_for_its_samples(backend, dtype):
    device, ops = backend
    logits, targets = make((7, 700), dtype, device)
    k, beta = 40, -0.25
    loss, state, samples = ops.one_token_rollout(logits, targets, SEEDS.to(device), 1.3, beta, k)
    assert samples.shape == (7, k) and (samples.diff(dim=-1) >= 0).all()
    z = logits.double().clone().requires_grad_()
    reward = torch.where(samples == targets[:, None], 1.0, beta)
    want = -(reward * z.log_softmax(-1).gather(-1, samples)).mean(-1)
    torch.testing.assert_close(loss.double(), want, rtol=2 * ERROR[dtype], atol=2 * ERROR[dtype])
    grad = ops.one_token_rollout_backward(logits, targets, samples, state, torch.full_like(loss, 2), 1.3, beta)
    want_grad, = torch.autograd.grad(2 * want.sum(), z)
    torch.testing.assert_close(grad.double(), want_grad, rtol=ROUNDING[dtype], atol=2 * SMALL[dtype])


@pytest.mark.parametrize("cols", [5, 64, 200])
def test_samples_follow_the_sampling_policy(backend, cols):
    device, ops = backend
    logits, targets = make((1, cols), torch.float32, device, scale=2.0)
    logits[0, 1] = -torch.inf
    n, k = 16, 512
    _, _, samples = ops.one_token_rollout(logits.expand(n, cols), targets.expand(n),
                                          torch.arange(n, device=device) * 7919, 1.5, 0.0, k)
    counts = samples.flatten().bincount(minlength=cols).double().cpu()
    q = (logits[0].double() / 1.5).softmax(-1).cpu()
    assert counts[1] == 0
    some = q * n * k > 5
    chi2 = ((counts - n * k * q)[some].square() / (n * k * q[some])).sum()
    freedom = int(some.sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations, of fixed seeds
    assert abs((counts.sum() - n * k).item()) == 0


def test_the_mean_over_seeds_approaches_the_exact_form():
    logits, targets = make((1, 40))
    n = 4000
    settings = {"temperature": 1.5, "beta": -0.1, "reduction": "none"}
    sampled = one_token_rollout_loss(logits.expand(n, 40), targets.expand(n), k=16, seeds=torch.arange(n), **settings)
    want = one_token_rollout_loss(logits, targets, **settings)
    assert abs(sampled.mean() - want) < 4 * sampled.std() / n**0.5


def test_draws_depend_on_the_seed_and_the_row_alone(backend):
    device, ops = backend
    logits, targets = make((7, 300), torch.float32, device)
    seeds = SEEDS.to(device)

    def call(rows):
        return ops.one_token_rollout(logits[rows], targets[rows], seeds[rows], 1.5, -0.1, 20)

    everything = call(slice(None))
    for i in range(7):
        assert all(torch.equal(a[i:i + 1], b) for a, b in zip(everything, call(slice(i, i + 1)), strict=True))
    _, _, again = ops.one_token_rollout(logits, targets, seeds + 1, 1.5, -0.1, 20)
    assert not torch.equal(again, everything[2])


def test_batch_item_equals_single(backend):
    device, ops = backend
    logits, targets = make((5, 4100), torch.float32, device)
    loss, state, _ = ops.one_token_rollout(logits, targets, None, 1.5, -0.1, 0)
    for i in range(5):
        one = ops.one_token_rollout(logits[i], targets[i], None, 1.5, -0.1, 0)
        assert torch.equal(one[0], loss[i]) and torch.equal(one[1], state[i])


def test_generator_and_threads_change_nothing():
    logits, targets = make((50, 3000), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            z = logits.clone().requires_grad_()
            loss = one_token_rollout_loss(z, targets, k=32, generator=torch.Generator().manual_seed(4))
            results.append((loss, *torch.autograd.grad(loss, z)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
    torch.manual_seed(0)
    a = one_token_rollout_loss(logits, targets, k=8)
    torch.manual_seed(0)
    assert torch.equal(a, one_token_rollout_loss(logits, targets, k=8))


@pytest.mark.parametrize("k", [0, 16])
def test_nan_and_infinities_stay_in_their_row(backend, k):
    device, ops = backend
    logits, targets = make((6, 2100), torch.float32, device)
    seeds = SEEDS[:6].to(device) if k else None
    targets[:] = 7
    want = ops.one_token_rollout(logits, targets, seeds, 1.5, -0.1, k)[0]
    logits[1, 3], logits[2, 2090], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 1000:] = -torch.inf
    loss, state, samples = ops.one_token_rollout(logits, targets, seeds, 1.5, -0.1, k)
    grad = ops.one_token_rollout_backward(logits, targets, samples, state, torch.ones_like(loss), 1.5, -0.1)
    assert loss[1:4].isnan().all() and torch.equal(loss[[0, 5]], want[[0, 5]])
    assert loss[4].isfinite() and (grad[4, 1000:] == 0).all() and not grad[[0, 4, 5]].isnan().any()
    assert all(grad[i].isnan().any() for i in (1, 2, 3))
    assert ((samples >= 0) & (samples < 2100)).all()
    if k == 0:
        torch.testing.assert_close(loss[4].double(), exact(logits[4], targets[4], temperature=1.5, beta=-0.1)[0])


def test_a_masked_target_has_no_loss_of_its_own(backend):
    device, ops = backend
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], device=device)
    targets = torch.tensor([1], device=device)
    loss, state, samples = ops.one_token_rollout(logits, targets, None, 1.5, 0.0, 0)
    grad = ops.one_token_rollout_backward(logits, targets, samples, state, torch.ones_like(loss), 1.5, 0.0)
    assert loss == 0 and (grad == 0).all()


def test_strided_input(backend):
    device, ops = backend
    x, targets = make((16, 10), torch.float32, device)
    for view, t in ((x[::2], targets[::2] % 10), (x[:, ::2], targets % 5), (x.t(), targets[:10] % 16),
                    (x[:1].expand(5, 10), targets[:5] % 10)):
        ours, theirs = (ops.one_token_rollout(a, t, None, 1.5, -0.1, 0) for a in (view, view.clone()))
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("k", [None, 5])
def test_gradients_of_every_order(k):
    # At an enormous temperature the sampling policy is uniform, so that the loss is a true function of the logits.
    logits, targets = make((3, 6))
    logits.requires_grad_()
    seeds = None if k is None else SEEDS[:3]
    for reduction in ("mean", "none"):
        def f(z, reduction=reduction):
            return one_token_rollout_loss(z, targets, temperature=1e30, beta=-0.4, k=k, seeds=seeds,
                                          reduction=reduction)
        assert torch.autograd.gradcheck(f, (logits,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (logits,))
    hessian = torch.func.hessian(lambda z: one_token_rollout_loss(z, targets, temperature=1.5, reduction="sum"))
    z = logits.detach()[None, 0]
    targets = targets[:1]
    q = (z / 1.5).softmax(-1)  # what autograd gives for the formula with q held constant
    w = q * torch.full_like(q, -0.1).scatter(-1, targets[:, None], 1.0)
    want = torch.func.hessian(lambda z: -(w * z.log_softmax(-1)).sum())(z)
    torch.testing.assert_close(hessian(z), want)


def test_targets_out_of_range():
    logits, targets = make((3, 6), torch.float32)
    for bad in (-1, 6):
        targets[1] = bad
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 6\), got {bad}"):
            one_token_rollout_loss(logits, targets)
    with pytest.raises(ValueError, match=r"samples must be in \[0, 6\), got 9"):
        torch.ops.gradops.one_token_rollout_backward(
            logits, targets * 0, torch.full((3, 1), 9), torch.zeros(3, 3, dtype=torch.float64), torch.ones(3), 1.5, 0.0)


def test_targets_out_of_range_on_cuda(cuda_backend):
    device, ops = cuda_backend
    logits, targets = make((3, 6), torch.float32, device)
    targets[1] = 6
    loss, state, samples = ops.one_token_rollout(logits, targets, None, 1.5, -0.1, 0)
    grad = ops.one_token_rollout_backward(logits, targets, samples, state, torch.ones_like(loss), 1.5, -0.1)
    assert loss.isnan().tolist() == [False, True, False] == grad.isnan().all(-1).tolist()


def test_bad_input():
    logits, targets = make((3, 6), torch.float32)
    with pytest.raises(TypeError, match="logits must be a torch.Tensor"):
        one_token_rollout_loss([1.0], targets)
    with pytest.raises(TypeError, match="logits must be float64"):
        one_token_rollout_loss(targets, targets)
    with pytest.raises(TypeError, match="targets must be int32 or int64"):
        one_token_rollout_loss(logits, logits[:, 0])
    with pytest.raises(TypeError, match="seeds must be int64"):
        one_token_rollout_loss(logits, targets, k=2, seeds=targets.int())
    for bad, match in (({"temperature": 0.0}, "temperature"), ({"temperature": float("inf")}, "temperature"),
                       ({"beta": float("nan")}, "beta"), ({"k": 0}, "k must be"), ({"k": 2.5}, "k must be"),
                       ({"seeds": targets}, "seeds are for"), ({"reduction": "max"}, "reduction must be"),
                       ({"k": 2, "seeds": targets[:2]}, "seeds must have the shape")):
        with pytest.raises(ValueError, match=match):
            one_token_rollout_loss(logits, targets, **bad)
    with pytest.raises(ValueError, match="targets must have the shape"):
        one_token_rollout_loss(logits, targets[:2])
    with pytest.raises(ValueError, match="V > 0"):
        one_token_rollout_loss(logits[:, :0], targets)
