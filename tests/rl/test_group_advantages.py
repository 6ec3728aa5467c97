import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import group_advantages, reference, trajectory_advantages

BASELINES = ("mean", "loo", "opo", "max2", "none")
SCALES = ("group", "batch", "loo", "mean", "none")
CHOICES = {"baseline": BASELINES, "scale": SCALES, "eps_mode": ("add", "max", "var"),
           "singleton": ("zero", "keep", "group"), "degenerate": ("zero", "keep")}  # fmt: skip
KINDS = [(b, s) for b, s in itertools.product(BASELINES, SCALES) if (b, s) != ("max2", "loo")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# The result is rounded once from float64 (twice where alpha blends).
ROUNDING = {torch.float64: 1e-12, torch.float32: 1.2e-7}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def raw(ops, rewards, *, offsets=None, ids=None, strata=None, valid=None, weights=None, lengths=None, group_size=1,
        alpha=1.0, correction=1.0, eps=1e-6, skip_nan=0, blend=0, **choices):
    rule = [values.index(choices.get(name, values[0])) for name, values in CHOICES.items()] + [skip_nan, blend]
    return ops.group_advantages(rewards, offsets, ids, strata, valid, weights, lengths, group_size, rule, correction,
                                eps, alpha)


def example(n=120, groups=9, dtype=torch.float64, seed=0, ties=True):
    g = seeded(seed)
    rewards = torch.randn(n, dtype=torch.float64, generator=g) + 1
    ids = torch.randint(0, groups, (n,), generator=g) * 10**9 - 5
    ids[0] = 77  # alone
    if ties:
        rewards[ids == ids[1]] = 0.1
    return rewards.to(dtype), ids


def close(ours, want, rounding=None):
    rounding = rounding or ROUNDING[ours.dtype]
    want = want.double().to(ours.device)
    scale = want.abs().clamp(min=1e-3 * float(want.abs().max()) if want.numel() else 0)
    assert ((ours.double() - want).abs() <= rounding * scale).all(), (ours.double() - want).abs().max()


@pytest.mark.parametrize("baseline, scale", KINDS)
def test_every_rule(backend, baseline, scale):
    device, ops = backend
    rewards, ids = example()
    g = seeded(1)
    optional = {"weights": torch.rand(120, dtype=torch.float64, generator=g) + 0.5,
                "valid": torch.rand(120, generator=g) < 0.7}
    lengths = torch.randint(1, 50, (120,), generator=g).double()
    rules = itertools.product(("add", "max", "var"), ("zero", "keep"), ("zero", "keep"))
    given = itertools.cycle([("weights",), (), ("weights", "valid"), ("valid",), ()])
    for (mode, singleton, degenerate), names in zip(rules, given, strict=False):
        choices = {"baseline": baseline, "scale": scale, "eps_mode": mode, "singleton": singleton,
                   "degenerate": degenerate}
        more = {k: optional[k] for k in names}
        a, same = raw(ops, rewards.to(device), ids=ids.to(device), lengths=lengths.to(device), **choices,
                      **{k: v.to(device) for k, v in more.items()})
        want, want_same = reference.group_advantages(rewards, ids=ids, lengths=lengths, **choices, **more)
        close(a, want, 1e-9)  # the reference's own sums round
        assert torch.equal(same.cpu(), want_same)


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_ways_to_group(backend, dtype):
    device, ops = backend
    rewards = torch.randn(96, generator=seeded()).to(device, dtype)
    numbers = torch.arange(96, device=device) // 12
    by_size = raw(ops, rewards, group_size=12)
    by_offsets = raw(ops, rewards, offsets=torch.arange(0, 97, 12, device=device))
    by_ids = raw(ops, rewards, ids=numbers)
    assert by_size[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for other in (by_offsets, by_ids):
        assert all(torch.equal(x, y) for x, y in zip(other, by_size, strict=True))
    close(by_size[0], reference.group_advantages(rewards.cpu().double(), group_size=12)[0])


# Sizes around every change of method: lanes side by side, one group over lanes, several buffers, a block on CUDA.
@pytest.mark.parametrize("sizes", [[1, 0, 2, 7, 8, 9, 0], [127, 128, 129, 3], [1000, 5, 0], [4095, 1], [4097], [0, 0],
                                   []])
def test_ragged_sizes(backend, sizes):
    device, ops = backend
    n = sum(sizes)
    rewards = torch.randn(n, generator=seeded()) + 3
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    a, same = raw(ops, rewards.to(device), offsets=offsets.to(device))
    want, want_same = reference.group_advantages(rewards.double(), offsets=offsets)
    close(a, want)
    assert torch.equal(same.cpu(), want_same)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
    by_ids = raw(ops, rewards.to(device), ids=ids.to(device))[0]
    assert torch.equal(by_ids, a)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=20), kind=st.sampled_from(KINDS), seed=st.integers(0, 99),
       dtype=st.sampled_from(DTYPES))
def test_any_shape(sizes, kind, seed, dtype):
    n = sum(sizes)
    rewards = torch.randint(0, 5, (n,), generator=seeded(seed)).to(dtype) / 4
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    lengths = torch.randint(1, 9, (n,), generator=seeded(seed))
    options = {"offsets": offsets, "lengths": lengths, "baseline": kind[0], "scale": kind[1]}
    a, same = group_advantages(rewards, **options)
    want, want_same = reference.group_advantages(rewards.double(), **options)
    close(a, want, max(ROUNDING[a.dtype], 1e-9))
    assert torch.equal(same, want_same)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e3, 1e5])
@pytest.mark.parametrize("n", [8, 63, 700, 5000])
def test_precision_where_the_mean_is_large(backend, offset, n):
    """Rewards c + 0.1 Bernoulli, |mean| / std up to 3e6: the result's own rounding is all that may be lost."""
    device, ops = backend
    rewards = (offset + 0.1 * (torch.rand(2 * n, generator=seeded()) < 0.3)).float()
    a = raw(ops, rewards.to(device), group_size=n)[0]
    exact = rewards.double().reshape(2, n)
    exact = ((exact - exact.mean(1, keepdim=True)) / (exact.std(1, keepdim=True) + 1e-6)).reshape(-1)
    assert ((a.double().cpu() - exact).abs() <= 2e-7 * exact.abs()).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["mean", "loo", "opo", "max2"])
def test_equal_rewards_give_exactly_zero(backend, baseline, scale):
    """In float32, eight rewards of 0.1 have a standard deviation of 8e-9 by the usual formula."""
    device, ops = backend
    if (baseline, scale) == ("max2", "loo"):
        return
    for value, dtype in itertools.product((0.1, -1e5 / 3, 0.0), (torch.float32, torch.float64)):
        rewards = torch.full((50,), value, dtype=dtype, device=device)
        for n in (2, 10, 50):
            a, same = raw(ops, rewards, group_size=n, baseline=baseline, scale=scale, eps=1e-12,
                          lengths=torch.arange(1.0, 51, dtype=torch.float64, device=device))
            assert (a == 0).all() and not torch.signbit(a).any() and same.all()
        a, _ = raw(ops, rewards, group_size=10, baseline=baseline, scale=scale, eps=0.0, degenerate="keep",
                   lengths=torch.ones(50, dtype=torch.float64, device=device))
        assert (a == 0).all()


def test_leave_one_out_of_an_outlier(backend):
    """The others of the one that differs have no deviation at all; a difference of sums would leave a residue."""
    device, ops = backend
    rewards = torch.tensor([0.35] * 7 + [0.0], device=device)
    a, _ = raw(ops, rewards, group_size=8, baseline="loo", scale="loo")
    assert a[7] == -rewards[0]
    want = (0.35 / 7) / (0.35 / 7**0.5 + 1e-6)
    torch.testing.assert_close(a[:7].cpu(), torch.full((7,), want))
    spread = torch.tensor([1e5, *(1 + 1e-3 * torch.arange(15)).tolist()])
    a, _ = raw(ops, spread.to(device), group_size=16, baseline="loo", scale="loo")
    close(a, reference.group_advantages(spread.double(), group_size=16, baseline="loo", scale="loo")[0], 2e-7)


@pytest.mark.parametrize("scale", ["group", "loo", "batch"])
def test_permutation(backend, scale):
    """Not one bit depends on the order, nor on what other groups there are."""
    device, ops = backend
    rewards, ids = (t.to(device) for t in example(400, 7, torch.float32, ties=False))
    more = {"weights": torch.rand(400, dtype=torch.float64, generator=seeded()).to(device),
            "lengths": torch.rand(400, dtype=torch.float64, generator=seeded(1)).to(device)}
    for baseline in ("mean", "loo", "opo", "max2") if scale == "group" else ("mean",):
        a = raw(ops, rewards, ids=ids, baseline=baseline, scale=scale, **more)[0]
        order = torch.randperm(400, generator=seeded(2)).to(device)
        b = raw(ops, rewards[order], ids=ids[order], baseline=baseline, scale=scale,
                **{k: v[order] for k, v in more.items()})[0]
        assert torch.equal(b, a[order])
        if scale != "batch":
            one = ids == ids[3]
            c = raw(ops, rewards[one], group_size=int(one.sum()), baseline=baseline, scale=scale,
                    **{k: v[one] for k, v in more.items()})[0]
            assert torch.equal(c, a[one])


LABELS = {"negative": torch.tensor([-1, -2, -1, -2, -(2**63)]), "sparse": torch.tensor([10**9, 3, 10**9, 3, 0]),
          "extreme": torch.tensor([2**63 - 1, -(2**63), 2**63 - 1, -(2**63), 0])}  # fmt: skip


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels(backend, labels):
    device, ops = backend
    rewards = torch.tensor([0.0, 1.0, 1.0, 3.0, 9.0])
    a, same = raw(ops, rewards.to(device), ids=labels.to(device), eps=0.0)
    h = 0.5**0.5
    torch.testing.assert_close(a.cpu(), torch.tensor([-h, -h, h, h, 0.0]))
    assert same.tolist() == [False] * 4 + [True]


def test_pairs_of_labels(backend):
    device, ops = backend
    g = seeded()
    rewards = torch.randn(200, generator=g)
    prompt, turn = torch.randint(-3, 3, (200,), generator=g) * 10**12, torch.randint(0, 4, (200,), generator=g)
    a = raw(ops, rewards.to(device), ids=prompt.to(device), strata=turn.to(device), baseline="loo", scale="none",
            singleton="keep")[0]
    want = reference.group_advantages(rewards.double(), ids=(prompt, turn), preset="trloo")[0]
    close(a, want)
    assert torch.equal(group_advantages(rewards, ids=(prompt, turn), preset="trloo")[0], a.cpu())


def test_pairs_of_any_range():
    """Two labels become one key, each by itself first where 64 bits would not hold it; tables grow on the way."""
    g = seeded()
    wide = torch.tensor([-(2**63), 2**63 - 1, 0, 7, -1])[torch.randint(0, 5, (3000,), generator=g)]
    sparse = torch.randint(-(2**40), 2**40, (900,), generator=g)[torch.randint(0, 900, (3000,), generator=g)]
    rewards = torch.randn(3000, generator=g)
    for pair in itertools.product((wide, sparse, sparse % 5), repeat=2):
        numbers = torch.unique(torch.stack(pair), dim=1, return_inverse=True)[1]
        want = group_advantages(rewards, ids=numbers)
        assert all(torch.equal(x, y) for x, y in zip(group_advantages(rewards, ids=pair), want, strict=True))


@pytest.mark.parametrize("singleton", ["zero", "keep", "group"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_strata(backend, alpha, singleton):
    device, ops = backend
    rewards, ids = example(150, 5)
    strata = torch.randint(0, 12, (150,), generator=seeded(3))
    rewards[3] = rewards[4]
    a, same = raw(ops, rewards.to(device), ids=ids.to(device), strata=strata.to(device), alpha=alpha, blend=1,
                  singleton=singleton, correction=0.0)
    want, want_same = reference.group_advantages(rewards, ids=ids, strata=strata, alpha=alpha, preset="san",
                                                 singleton=singleton)
    close(a, want, 1e-9)
    assert torch.equal(same.cpu(), want_same) and not a.isnan().any()


def test_nan_stays_in_its_group(backend):
    device, ops = backend
    rewards, ids = (t.to(device) for t in example(60, 4, torch.float32))
    for baseline, scale in KINDS:
        if scale == "batch" or (baseline, scale) == ("none", "none"):
            continue
        options = {"ids": ids, "baseline": baseline, "scale": scale,
                       "lengths": torch.ones(60, dtype=torch.float64, device=device)}
        want = raw(ops, rewards, **options)[0]
        for bad in (torch.nan, torch.inf):
            poisoned = rewards.clone()
            poisoned[5] = bad
            a, same = raw(ops, poisoned, **options)
            mine = ids == ids[5]
            assert torch.equal(a[~mine], want[~mine])
            if torch.isnan(poisoned[5]):
                assert a[mine].isnan().all() and not same[mine].any()


def test_invalid_members_count_for_nothing(backend):
    device, ops = backend
    rewards, ids = (t.to(device) for t in example(60, 4, torch.float32))
    valid = torch.ones(60, dtype=torch.bool, device=device)
    valid[10:20] = False
    rewards[10:20] = torch.nan
    for baseline, scale in KINDS:
        options = {"baseline": baseline, "scale": scale}
        lengths = torch.arange(1.0, 61, dtype=torch.float64, device=device)
        a, _ = raw(ops, rewards, ids=ids, valid=valid, lengths=lengths, **options)
        want, _ = raw(ops, rewards[valid], ids=ids[valid], lengths=lengths[valid], **options)
        assert (a[10:20] == 0).all() and torch.equal(a[valid], want)
        skipped, _ = raw(ops, rewards, ids=ids, lengths=lengths, skip_nan=1, **options)
        assert torch.equal(skipped, a)


def test_partial_groups():
    """Groups that lost members must not be regrouped by stride."""
    rewards, ids = torch.tensor([1.0, 0.0, 1.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    a, same = group_advantages(rewards, ids=ids)
    want = rewards[:3] - rewards[:3].mean()
    torch.testing.assert_close(a[:3], want / (rewards[:3].std() + 1e-6))
    assert (a[3:] == 0).all() and same.tolist() == [False] * 3 + [True] * 2
    with pytest.raises(ValueError, match="group_size must be a positive integer that divides the number of rewards, 5"):
        group_advantages(rewards, group_size=3)


def test_rows_are_independent(backend):
    device, ops = backend
    rows = torch.randn(3, 40, generator=seeded()).to(device)
    ids = torch.randint(0, 6, (40,), generator=seeded()).to(device)
    for options in ({"ids": ids}, {"group_size": 8}, {"ids": ids, "scale": "batch"}):
        a, same = raw(ops, rows, **options)
        for i in range(3):
            one, one_same = raw(ops, rows[i], **options)
            assert torch.equal(a[i], one) and torch.equal(same[i], one_same)


def test_strided_and_unmodified(backend):
    device, ops = backend
    rewards, ids = (t.to(device) for t in example(80, 6, torch.float32))
    before = rewards.clone()
    a = raw(ops, rewards[::2], ids=ids[::2])[0]
    assert torch.equal(a, raw(ops, rewards[::2].clone(), ids=ids[::2].clone())[0]) and torch.equal(rewards, before)
    same = raw(ops, rewards[:1].expand(80), ids=ids)[0]
    assert (same == 0).all()


def test_many_labels(cuda_backend):
    """More than one block, one of which has a large group."""
    device, ops = cuda_backend
    n = 3000
    rewards = torch.randn(n, generator=seeded())
    ids = torch.randint(-200, 200, (n,), generator=seeded()) * 7**15
    ids[::4] = 5
    a, same = raw(ops, rewards.to(device), ids=ids.to(device))
    want, want_same = group_advantages(rewards, ids=ids)
    close(a, want)
    assert torch.equal(same.cpu(), want_same)


def test_offsets_that_do_not_cover(cuda_backend):
    device, ops = cuda_backend
    rewards = torch.tensor([5.0, 0.0, 1.0, 7.0], device=device)
    a, same = raw(ops, rewards, offsets=torch.tensor([1, 3], device=device))
    assert a[0] == a[3] == 0 and a[1] < 0 < a[2] and same[0] and same[3]
    a, _ = raw(ops, rewards, offsets=torch.tensor([0, 900], device=device))
    assert not a.isnan().any()


def test_threads():
    rewards, ids = example(100_000, 3000, torch.float32, ties=False)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(group_advantages(rewards, ids=ids)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_gdpo_normalises_column_by_column():
    g = seeded()
    rewards = torch.rand(24, 3, generator=g, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 2.0])
    a, same = group_advantages(rewards, group_size=6, preset="gdpo", weights=weights)
    columns = [group_advantages(c, group_size=6, preset="grpo")[0] for c in rewards.T]
    total = sum(w * c for w, c in zip(weights.tolist(), columns, strict=True))
    torch.testing.assert_close(a, (total - total.mean()) / (total.std() + 1e-6))
    want, want_same = reference.group_advantages(rewards, group_size=6, preset="gdpo", weights=weights)
    close(a, want, 1e-9)
    assert torch.equal(same, want_same)


def test_adora_preset():
    rewards, lengths = torch.tensor([1.0, 0, 1, 0]), torch.tensor([9, 5, 5, 9])
    a, _ = group_advantages(rewards, group_size=2, lengths=lengths, preset="adora")
    plain, _ = group_advantages(rewards, group_size=2)
    torch.testing.assert_close(a, plain * torch.tensor([1.0, 1.0, 0.1, 0.1]))
    assert torch.equal(group_advantages(rewards, ids=torch.tensor([4, 4, 0, 0]), lengths=lengths, preset="adora")[0], a)


def test_trajectories_count_once():
    g = seeded()
    sizes = [5, 1, 0, 7, 3]
    trajectories = torch.tensor([1, 1, 1, -4, 9, 0, 3, 3, 3, 3, 2, 2, 8, 6, 6, 6])
    outcome = {int(t): float(r) for t, r in zip(range(-4, 10), torch.rand(14, generator=g), strict=True)}
    rewards = torch.tensor([outcome[t] for t in trajectories.tolist()])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    for singleton in ("keep", "zero"):
        a = trajectory_advantages(rewards, trajectories, offsets, singleton=singleton)
        close(a, reference.trajectory_advantages(rewards.double(), trajectories, offsets, singleton=singleton))
        # the last prompt has one trajectory of three segments
        torch.testing.assert_close(a[-3:], rewards[-3:] / (1 + 1e-6) if singleton == "keep" else 0 * rewards[-3:])
    r = torch.tensor([outcome[t] for t in (1, -4, 9)])
    want = ((r - r.mean()) / (r.std() + 1e-6))[[0, 0, 0, 1, 2]]
    torch.testing.assert_close(trajectory_advantages(rewards, trajectories, offsets)[:5], want)


def test_a_derivative_is_refused():
    with pytest.raises(RuntimeError, match="rewards asks for a derivative"):
        group_advantages(torch.ones(4, requires_grad=True), group_size=2)


def test_bad_input():
    r = torch.rand(6)
    for error, match, call in [
        (TypeError, "rewards must be a torch.Tensor, got ndarray", lambda: group_advantages(np.ones(4), group_size=2)),
        (TypeError, "rewards must be float64", lambda: group_advantages(torch.ones(4).long(), group_size=2)),
        (ValueError, "rewards must have 1 dimension", lambda: group_advantages(r.reshape(3, 2), group_size=3)),
        (ValueError, "exactly one of offsets, ids and group_size must be given, got none", lambda: group_advantages(r)),
        (ValueError, "got offsets and group_size",
         lambda: group_advantages(r, offsets=torch.tensor([0, 6]), group_size=3)),
        (ValueError, "group_size must be a positive", lambda: group_advantages(r, group_size=4)),
        (TypeError, "ids must be int32 or int64", lambda: group_advantages(r, ids=r)),
        (ValueError, r"ids must have one entry for each of rewards, shape \(6,\), got \(5,\)",
         lambda: group_advantages(r, ids=torch.ones(5, dtype=torch.int64))),
        (TypeError, "valid must be torch.bool", lambda: group_advantages(r, group_size=3, valid=torch.ones(6))),
        (ValueError, "baseline must be one of 'mean'", lambda: group_advantages(r, group_size=3, baseline="median")),
        (ValueError, "singleton must be one of 'zero', 'keep'",
         lambda: group_advantages(r, group_size=3, singleton="group")),
        (ValueError, "eps must not be negative", lambda: group_advantages(r, group_size=3, eps=-1.0)),
        (ValueError, "preset must be one of", lambda: group_advantages(r, group_size=3, preset="ppo")),
        (ValueError, "compat must be one of", lambda: group_advantages(r, group_size=3, compat="numpy")),
        (ValueError, "scale must be 'none' with preset='dr_grpo', got 'group'",
         lambda: group_advantages(r, group_size=3, preset="dr_grpo", scale="group")),
        (ValueError, "eps must be 0.0001 with compat='trl', got 1e-06",
         lambda: group_advantages(r, group_size=3, compat="trl", eps=1e-6)),
        (ValueError, "preset must be one of 'grpo'",
         lambda: group_advantages(r, group_size=3, compat="trl", preset="opo")),
        (ValueError, "lengths must be given", lambda: group_advantages(r, group_size=3, preset="opo")),
        (ValueError, "strata must be given with preset='san'", lambda: group_advantages(r, group_size=3, preset="san")),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    for offsets in ([0, 4, 2, 6], [0, 3], [1, 6], [0, 7], [0, 900, 6], [-5, 6]):
        with pytest.raises(ValueError, match=r"offsets must rise from 0 to 6, got -?\d+ at index [0-2]"):
            group_advantages(r, offsets=torch.tensor(offsets))
