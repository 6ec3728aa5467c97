import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.ot import reference, router

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOKENS = {"mode": "tokens_choose"}
EXPERTS = {"mode": "experts_choose"}


def logits(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def raw(ops, x, *, capacity=None, top_k=None, n_steps=20, gamma=1.0, mode="tokens_choose", lr=1e-2):
    width, cap = (capacity, -1) if mode == "experts_choose" else (top_k, -1 if capacity is None else capacity)
    return ops.router(x, mode == "experts_choose", width, cap, n_steps, gamma, lr)


def close(ours, want, rounding):
    """All nine tensors; with the same assignment."""
    want = [want[0], want[1], *want[2]]
    for name, a, b in zip(("indices", "weights", "plan", "load", "taken", "overflow", "dropped", "residual", "value"),
                          ours, want, strict=True):
        assert a.shape == b.shape and a.dtype == (b.dtype if name != "weights" else a.dtype), name
        if a.is_floating_point():
            torch.testing.assert_close(a.double(), b.double(), atol=rounding, rtol=rounding, equal_nan=True, msg=name)
        else:
            assert torch.equal(a, b), name


# Capacity refuses something in the second and the fourth; gamma is small enough for unused slots in the last two.
CASES = [
    ((2, 40, 6), {"top_k": 2}), ((37, 5), {"top_k": 1, "capacity": 5}), ((2, 30, 5), {"top_k": 5}),
    ((33, 12), {"top_k": 10, "capacity": 12}), ((2, 40, 6), {"capacity": 8, **EXPERTS}),
    ((5, 3), {"capacity": 9, **EXPERTS}), ((20, 4), {"top_k": 3, "gamma": 0.2}),
    ((20, 4), {"capacity": 12, "gamma": 0.02, **EXPERTS}),
]  # fmt: skip


@pytest.mark.parametrize("shape, arguments", CASES)
def test_matches_float64(backend, shape, arguments):
    device, ops = backend
    x = logits(*shape).to(device)
    before = x.clone()
    ours = raw(ops, x, **arguments, n_steps=6)
    assert torch.equal(x, before)
    close(ours, reference.router(x, **arguments, n_steps=6), 1e-12)


# Float arithmetic may part from float64 where two entries agree to rounding; these seeds have none such.
@pytest.mark.parametrize("arguments", [{"top_k": 2, "capacity": 20}, {"top_k": 12}, {"capacity": 16, **EXPERTS}])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_narrow_dtypes(arguments, dtype):
    x = logits(2, 128, 16, dtype=dtype)
    ours = raw(torch.ops.gradops, x, **arguments)
    want = reference.router(x, **arguments)  # in float32
    assert ours[1].dtype == dtype and ours[2].dtype == torch.float32
    if dtype == torch.float32:
        exact = reference.router(x.double(), **arguments)
        close(ours, (exact[0], exact[1], exact[2]._replace(plan=exact[2].plan.float())), 2e-6)
    close(ours, want, 2e-6 if dtype == torch.float32 else 4e-3)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 9), k=st.integers(1, 20), choose=st.booleans(),
       capacity=st.integers(1, 12), gamma=st.sampled_from([0.05, 1.0, 20.0]), seed=st.integers(0, 99))
def test_promises(tokens, experts, k, choose, capacity, gamma, seed):
    x = logits(2, tokens, experts, seed=seed)
    x[logits(*x.shape, seed=seed + 100) > 1.5] = -torch.inf
    arguments = {"capacity": capacity, **EXPERTS} if choose else {"top_k": min(k, experts), "capacity": capacity}
    indices, weights, info = router(x, gamma=gamma, **arguments)
    used = indices >= 0
    gates = x.softmax(-1).mT if choose else x.softmax(-1)
    assert ((info.plan > 0) == used).all() and (weights[~used] == 0).all()
    assert (used.int().diff(dim=-1) <= 0).all()  # unused slots come last
    assert (indices.diff(dim=-1)[used[..., 1:]] > 0).all()
    torch.testing.assert_close(weights[used], gates.gather(-1, indices.clamp(min=0))[used])
    assert (info.load <= capacity).all() and info.load.sum() == used.sum() == info.taken.sum()
    real = (x > -torch.inf).any(-1)
    assert torch.equal(info.dropped, ((info.taken == 0) & real).sum(-1)) and (info.taken[~real] == 0).all()
    mass = info.plan.sum(-1)  # of a column: nothing is missing but what capacity refused
    if choose:
        want = (real.sum(-1, keepdim=True).double() / experts) * (x > -torch.inf).any(-2)
        assert (info.overflow == 0).all()
    else:
        want = torch.where(info.overflow > 0, mass, real.double())
    torch.testing.assert_close(mass, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("arguments", [{"top_k": 2, "capacity": 5}, {"capacity": 6, **EXPERTS}, {"top_k": 9}])
def test_ties_go_to_the_lowest_index(backend, arguments):
    device, ops = backend
    x = torch.zeros(24, 10, dtype=torch.float64, device=device)
    ours = raw(ops, x, **arguments, n_steps=3)
    close(ours, reference.router(x, **arguments, n_steps=3), 1e-12)
    x[::2] = 1.0  # the same gates, and so ties again
    assert all(torch.equal(a, b) for a, b in zip(ours, raw(ops, x, **arguments, n_steps=3), strict=True))


def test_overflow_keeps_the_largest_masses():
    x = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    indices, _, info = router(x, top_k=2, capacity=2, n_steps=0)
    assert indices.tolist() == [[0, -1], [1, -1], [0, 1], [-1, -1]]  # rows 2 and 3 are equal: the first one stays
    assert info.overflow.tolist() == [1, 1, 0, 2]
    assert info.dropped == 1 and info.taken.tolist() == [1, 1, 2, 0]


def test_it_balances():
    x = logits(512, 8, dtype=torch.float32) + torch.linspace(0, 4, 8)  # everyone likes the last expert
    greedy = torch.bincount(x.topk(2).indices.flatten(), minlength=8)
    _, _, info = router(x, top_k=2, n_steps=100)
    assert greedy.max() > 3 * greedy.float().mean()
    assert info.load.max() < 1.3 * info.load.float().mean()
    residual = [router(x, top_k=2, n_steps=n)[2].residual for n in (0, 20, 100)]
    assert residual[0] > residual[1] > 5 * residual[2]
    values = [router(x, top_k=2, n_steps=n)[2].dual_value for n in (0, 5, 20, 100)]
    assert values == sorted(values)


def test_masked_tokens_take_no_part(backend):
    device, ops = backend
    x = logits(20, 4).to(device)
    padded = torch.cat([x, torch.full((13, 4), -torch.inf, dtype=torch.float64, device=device)])
    for arguments in ({"top_k": 2}, {"capacity": 7, **EXPERTS}):
        a, b = raw(ops, x, n_steps=4, **arguments), raw(ops, padded, n_steps=4, **arguments)
        rows = 20 if arguments.get("top_k") else 4
        assert torch.equal(a[0], b[0][:rows]) and torch.equal(a[3], b[3]) and torch.equal(a[6], b[6])
        assert (b[0][rows:] == -1).all() and (b[4][20:] == 0).all()
        torch.testing.assert_close(a[8], b[8])


def test_nan_and_inf_stay_in_their_group(backend):
    device, ops = backend
    x = logits(3, 12, 4).to(device)
    for arguments in ({"top_k": 2, "capacity": 4}, {"capacity": 4, **EXPERTS}):
        want = raw(ops, x, n_steps=3, **arguments)
        bad = x.clone()
        bad[0, 3, 1], bad[2, 0, 0] = torch.nan, torch.inf
        ours = raw(ops, bad, n_steps=3, **arguments)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(ours, want, strict=True))
        for i in (0, 2):
            indices, weights, plan, load, taken, overflow, dropped, residual, value = (t[i] for t in ours)
            assert (indices == -1).all() and weights.isnan().all() and plan.isnan().all() and dropped == 12
            assert not (load.any() or taken.any() or overflow.any()) and residual.isnan() and value.isnan()
        close(ours, reference.router(bad, n_steps=3, **arguments), 1e-12)


def test_batch_item_equals_single_and_strides_do_not_matter():
    x = logits(3, 50, 12, dtype=torch.float32)
    for arguments in ({"top_k": 3, "capacity": 13}, {"capacity": 9, **EXPERTS}):
        whole = raw(torch.ops.gradops, x, **arguments)
        for view, same in ((x.mT.contiguous().mT, x), (x[:1].expand(3, 50, 12), x[:1].repeat(3, 1, 1)),
                           (x[:, ::2, ::2], x[:, ::2, ::2].clone())):
            if view.shape[-1] >= 3:
                pairs = zip(raw(torch.ops.gradops, view, **arguments), raw(torch.ops.gradops, same, **arguments),
                            strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
        for i in range(3):
            single = raw(torch.ops.gradops, x[i], **arguments)
            assert all(torch.equal(a[i], b) for a, b in zip(whole, single, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (3, 0, 0, 2)])
def test_empty(backend, shape):
    device, ops = backend
    x = torch.zeros(shape, device=device)
    for arguments in ({"top_k": 2}, {"capacity": 3, **EXPERTS}):
        ours = raw(ops, x, **arguments)
        assert (ours[0] == -1).all() and (ours[1] == 0).all() and (ours[3] == 0).all()
        assert ours[7].tolist() == torch.zeros(shape[:-2]).tolist()


@pytest.mark.parametrize("arguments", [{"top_k": 2, "capacity": 4}, {"capacity": 4, **EXPERTS}])
def test_gradient_of_the_weights(arguments):
    x = logits(2, 12, 5).requires_grad_()
    x.data[0, 3] = -torch.inf  # masked: no gradient, and no NaN
    x.data[1, 2, 4] = -torch.inf
    indices, weights, info = router(x, **arguments)
    assert not info.plan.requires_grad and torch.equal(indices, router(x.detach(), **arguments)[0])
    g = torch.randn_like(weights)
    ours, = torch.autograd.grad(weights, x, g)
    gates = x.masked_fill((x == -torch.inf).all(-1, keepdim=True), 0).softmax(-1)
    taken = (gates.mT if arguments.get("mode") else gates).gather(-1, indices.clamp(min=0))
    want, = torch.autograd.grad(torch.where(indices >= 0, taken, 0), x, g)
    torch.testing.assert_close(ours, want)
    assert (ours[0, 3] == 0).all() and ours.abs().max() > 0
    torch.autograd.gradcheck(lambda y: router(y, **arguments)[1], logits(2, 6, 4).requires_grad_(),
                             check_forward_ad=True, check_batched_grad=True)


def test_compiles_with_all_it_returns():
    def f(x):
        indices, weights, info = router(x, top_k=2, capacity=x.shape[-2] // 2)
        return indices, weights, info.load, info.residual

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (10, 12):
        x = logits(2, tokens, 4, dtype=torch.float32).requires_grad_()
        for a, b in zip(compiled(x), f(x), strict=True):
            assert torch.equal(a, b)


def test_tiny_gamma_takes_one_expert_each():
    x = logits(64, 6, dtype=torch.float32)
    indices, _, info = router(x, top_k=3, gamma=1e-9, n_steps=0)
    assert torch.equal(indices[:, 0], x.argmax(-1)) and (indices[:, 1:] == -1).all()
    torch.testing.assert_close(info.plan[:, 0], torch.ones(64), atol=1e-6, rtol=0)


def test_bad_input():
    x = torch.zeros(4, 3)
    with pytest.raises(TypeError, match="logits must be a torch.Tensor, got ndarray"):
        router(np.ones((4, 3)), top_k=1)
    with pytest.raises(TypeError, match="logits must be float64"):
        router(x.long(), top_k=1)
    with pytest.raises(TypeError, match="lr must be a number, got str"):
        router(x, top_k=1, lr="x")
    for arguments, message in [
        ({}, r"top_k must be an int in \[1, 3\] where tokens choose, got None"), ({"top_k": 4}, "top_k must be an int"),
        ({"top_k": 1.0}, "top_k must be an int"), ({"top_k": 1, "capacity": 0}, "capacity must be a positive int"),
        (EXPERTS, "capacity must be given where experts choose"), ({"top_k": 1, "n_steps": -1}, "n_steps must be"),
        ({"top_k": 1, "capacity": 2, **EXPERTS}, "top_k is for tokens_choose"),
        ({"top_k": 1, "gamma": 0.0}, "gamma must be positive"), ({"top_k": 1, "lr": float("nan")}, "lr must be finite"),
        ({"top_k": 1, "mode": "expert"}, "mode must be one of 'tokens_choose', 'experts_choose', got 'expert'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            router(x, **arguments)
    for shape in ((3,), (4, 0)):
        with pytest.raises(ValueError, match="logits must have the shape"):
            router(torch.zeros(shape), top_k=1)


@pytest.mark.parametrize("level", ["v2"])
def test_level(level, run_at_level):
    run_at_level(level, "(cpu and test_matches) or test_narrow", __file__)
