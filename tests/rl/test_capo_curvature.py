import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import capo_curvature, capo_curvature_sgd, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tokens(n, k, h, dtype=torch.float64, seed=0, rows=11):
    """Everything capo_curvature takes: some actions outside of the support, some rows never updated."""
    g = torch.Generator().manual_seed(seed)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype)
    probs = (3 * torch.randn(n, k, generator=g, dtype=torch.float64)).softmax(-1).to(work)
    action = torch.randint(-1, k, (n,), generator=g)
    advantages = torch.randn(n, generator=g, dtype=torch.float64).to(work)
    ids = torch.randint(0, rows, (n, k), generator=g)
    m = torch.randn(rows, h, generator=g, dtype=torch.float64).to(work)
    s = torch.rand(rows, h, generator=g, dtype=torch.float64).to(work)
    m[:3], s[:3] = 0, 0
    return (hidden, probs, action, advantages), {"token_ids": ids, "exp_avg": m, "exp_avg_sq": s}


def raw(ops, args, adam=None, betas=(0.9, 0.999), eps=1e-8, step=4):
    moments = adam.values() if adam else (None, None, None)
    return ops.capo_curvature(*args, *moments, *betas, eps, step)


def exact(args, adam=None, **options):
    def double(x):
        return x.double() if x.is_floating_point() else x

    adam = {"model": "adam", **{name: double(x) for name, x in adam.items()}} if adam else {}
    return reference.capo_curvature(*map(double, args), **adam, **options)


def error(got, want, scale):
    return max(float(((a.double() - b) / c).abs().max()) for a, b, c in zip(got, want, scale, strict=True))


def sizes(args, adam):
    """What the parts of each result add up to when none cancels: rounding is relative to that."""
    hidden, probs, action, advantages = (x.double() if x.is_floating_point() else x for x in args)
    v = (torch.arange(probs.shape[1], device=probs.device) == action[:, None]).double() - probs
    gradient = advantages[:, None, None] * v[:, :, None] * hidden[:, None, :]
    if adam:
        m, s = adam["exp_avg"].double()[adam["token_ids"]], adam["exp_avg_sq"].double()[adam["token_ids"]]
        first = (0.9 * m.abs() + 0.1 * gradient.abs()) / (1 - 0.9**5)
        gradient = first / (((0.999 * s + 0.001 * gradient**2) / (1 - 0.999**5)).sqrt() + 1e-8)
    u = (gradient.abs() * hidden[:, None, :].abs()).sum(-1)
    along = (v.abs() * u).sum(-1)
    spread = (probs * u * u).sum(-1)
    return [x + 1e-30 for x in (advantages.abs() * along, advantages.abs() * (along**2 + spread), along**2)]


@pytest.mark.parametrize("model", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 33), (4, 2, 130), (2, 6, 300), (5, 3, 0), (3, 0, 7), (0, 2, 3)])
def test_matches_the_dense_form(backend, shape, dtype, model):
    device, ops = backend
    args, adam = tokens(*shape, dtype)
    args, adam = [x.to(device) for x in args], {a: x.to(device) for a, x in adam.items()} if model == "adam" else None
    got = raw(ops, args, adam)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(x.dtype == work and x.shape == shape[:1] for x in got)
    if shape[0]:
        want = exact(args, adam, **({"step": 4} if adam else {}))
        # float32: a few roundings per entry, and sums of 16 to 32 partial sums
        assert error(got, want, sizes(args, adam)) < (1e-14 if dtype == torch.float64 else 1e-6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 5), k=st.integers(1, 9), h=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 99), model=st.sampled_from(["sgd", "adam"]))
def test_any_shape(n, k, h, dtype, seed, model):
    args, adam = tokens(n, k, h, dtype, seed)
    adam = adam if model == "adam" else {}
    got = capo_curvature(*args, model=model, step=4, **adam)
    want = exact(args, adam, **({"step": 4} if adam else {}))
    assert n == 0 or error(got, want, sizes(args, adam)) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_first_step_of_adam_goes_along_the_sign():
    (hidden, probs, action, advantages), _ = tokens(4, 5, 40)
    zeros = torch.zeros(5, 40, dtype=torch.float64)
    grad_dot, _, fisher = capo_curvature(hidden, probs, action, advantages, model="adam", eps=1e-30, exp_avg=zeros,
                                         exp_avg_sq=zeros, token_ids=torch.arange(5).expand(4, 5))
    v = torch.where(torch.arange(5) == action[:, None], 1 - probs, -probs)
    along = (v.abs() * hidden.abs().sum(-1, keepdim=True)).sum(-1)
    torch.testing.assert_close(grad_dot, advantages.abs() * along)
    torch.testing.assert_close(fisher, along**2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_form_matches_the_full_support(backend, dtype):
    device, ops = backend
    (hidden, probs, action, advantages), _ = tokens(6, 8, 50, dtype)
    p = probs.double()
    action = action.clamp_min(0)
    work = probs.dtype
    logp, p2, p3 = p.gather(1, action[:, None])[:, 0].log(), (p**2).sum(1), (p**3).sum(1)
    got = ops.capo_curvature_sgd(*(x.to(device) for x in (hidden, logp.to(work), p2.to(work), p3.to(work), advantages)))
    args = (hidden.double(), p, action, advantages.double())
    want = reference.capo_curvature(*args)
    # the digits that sum_p2 and p^2 share are lost: the error is relative to |h|^2, not to |h|^2 |v|^2
    scale = [x + (advantages.double().abs() * hidden.double().square().sum(-1)) ** q
             for x, q in zip(sizes(args, None), (1, 2, 2), strict=True)]
    assert error(got, want, scale) < (1e-14 if dtype == torch.float64 else 1e-6)
    twin = reference.capo_curvature_sgd(hidden.double(), logp, p2, p3, advantages.double())
    for a, b in zip(twin, want, strict=True):
        torch.testing.assert_close(a, b)


def test_closed_form_of_a_certain_policy_is_zero():
    one = torch.ones(1)
    assert all(x.item() == 0 for x in capo_curvature_sgd(torch.randn(1, 9), 0 * one, one, one, one))
    assert all(x.item() == 0 for x in capo_curvature_sgd(torch.randn(1, 9), 0 * one, one - 1e-7, one - 1e-7, one))


def test_leading_dimensions_and_strides():
    (hidden, probs, action, advantages), adam = tokens(12, 5, 24, torch.float32)
    want = capo_curvature(hidden, probs, action, advantages, model="adam", step=2, **adam)
    ids = adam.pop("token_ids")
    got = capo_curvature(hidden.reshape(3, 4, 24), probs.reshape(3, 4, 5), action.reshape(3, 4).int(),
                         advantages.reshape(3, 4), model="adam", step=2, token_ids=ids.reshape(3, 4, 5).int(), **adam)
    assert all(torch.equal(a.flatten(), b) and a.shape == (3, 4) for a, b in zip(got, want, strict=True))
    got = capo_curvature(hidden.mT.contiguous().mT, probs.mT.contiguous().mT, action, advantages, model="adam", step=2,
                         token_ids=ids.mT.contiguous().mT, **adam)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    third = hidden[3], probs[3], action[3], advantages[3]
    single = capo_curvature(*third, model="adam", step=2, token_ids=ids[3], **adam)
    assert all(torch.equal(a, b[3]) for a, b in zip(single, want, strict=True))


def test_nan_stays_in_its_token(backend):
    device, ops = backend
    args, adam = tokens(5, 4, 40, torch.float32)
    args, adam = [x.to(device) for x in args], {name: x.to(device) for name, x in adam.items()}
    before = raw(ops, args, adam)
    args[0][1, 7], args[1][2, 0], args[3][3] = torch.nan, torch.nan, torch.nan
    for moments in (adam, None):
        after = raw(ops, args, moments)
        assert all(x[1:4].isnan().all() for x in (after[0], after[1]))
        assert after[2][1].isnan() and after[2][2].isnan()
        if moments:
            assert all(torch.equal(a[[0, 4]], b[[0, 4]]) for a, b in zip(after, before, strict=True))


def test_bad_indices_on_the_cpu():
    args, adam = tokens(4, 3, 8)
    with pytest.raises(ValueError, match="action_index must be below 3, got 3"):
        capo_curvature(args[0], args[1], torch.tensor([0, 3, 0, 0]), args[3])
    for bad in (-1, 11):
        ids = adam["token_ids"].clone()
        ids[2, 1] = bad
        with pytest.raises(ValueError, match=rf"token_ids must be in \[0, 11\), got {bad}"):
            capo_curvature(*args, model="adam", **{**adam, "token_ids": ids})


def test_bad_indices_give_nan_on_cuda(cuda_backend):
    device, ops = cuda_backend
    args, adam = tokens(4, 3, 8)
    args[2][1] = 3
    adam["token_ids"][2, 0] = -1
    adam["token_ids"][3, 2] = 11
    got = raw(ops, [x.to(device) for x in args], {name: x.to(device) for name, x in adam.items()})
    assert all(x[0].isfinite() and x[1:].isnan().all() for x in got)


def test_bad_input():
    args, adam = tokens(4, 3, 8)
    hidden, probs, action, advantages = args
    with pytest.raises(TypeError, match="hidden must be a torch.Tensor, got list"):
        capo_curvature([1.0], probs, action, advantages)
    with pytest.raises(ValueError, match=r"must agree in all but the last dimension, got \(3, 8\) and \(4, 3\)"):
        capo_curvature(hidden[:3], probs, action, advantages)
    with pytest.raises(TypeError, match=r"action_index must be int32 or int64, got torch.float64"):
        capo_curvature(hidden, probs, advantages, advantages)
    with pytest.raises(ValueError, match=r"advantages must have hidden's shape without .* \(4,\), got \(3,\)"):
        capo_curvature(hidden, probs, action, advantages[:3])
    with pytest.raises(ValueError, match="model must be one of 'sgd', 'adam', got 'rms'"):
        capo_curvature(*args, model="rms")
    with pytest.raises(ValueError, match="exp_avg must be None"):
        capo_curvature(*args, exp_avg=adam["exp_avg"])
    with pytest.raises(TypeError, match="exp_avg must be a torch.Tensor, got NoneType"):
        capo_curvature(*args, model="adam")
    with pytest.raises(TypeError, match="exp_avg must be torch.float64 for hidden of torch.float64"):
        capo_curvature(*args, model="adam", **{**adam, "exp_avg": adam["exp_avg"].float()})
    with pytest.raises(ValueError, match=r"exp_avg_sq must have shape \(U, H\) with H = 8"):
        capo_curvature(*args, model="adam", **{**adam, "exp_avg_sq": adam["exp_avg_sq"][:, :7]})
    with pytest.raises(ValueError, match="exp_avg must be contiguous"):
        capo_curvature(*args, model="adam", **{**adam, "exp_avg": adam["exp_avg"].mT.contiguous().mT})
    for name, value in (("betas", (0.9, 1.0)), ("eps", 0.0), ("step", -1), ("step", 0.5)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            capo_curvature(*args, model="adam", **adam, **{name: value})
    with pytest.raises(ValueError, match=r"sum_p2 must have the shape of logp"):
        capo_curvature_sgd(hidden, advantages, advantages[:2], advantages, advantages)
    with pytest.raises(ValueError, match=r"logp must have hidden's shape"):
        capo_curvature_sgd(hidden, advantages[:2], advantages, advantages, advantages)
