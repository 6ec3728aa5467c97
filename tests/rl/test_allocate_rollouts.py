import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import allocate_rollouts, reference


def utility(counts, p):
    counts, p = counts.double(), p.double()
    return float((counts * (1 - p) * (1 - (1 - p) ** (counts - 1))).sum())


def test_greedy_is_not_optimal():
    p = torch.tensor([0.03, 0.05, 0.5])
    greedy, exact = allocate_rollouts(p, 24, method="greedy"), allocate_rollouts(p, 24)
    assert greedy.tolist() == [2, 2, 20] and exact.tolist() == [2, 20, 2]
    assert abs(utility(greedy, p) - 10.15) < 0.01 and abs(utility(exact, p) - 12.39) < 0.01


def test_utility_is_the_expected_number_of_failures_beside_a_success():
    n, p = 9, 0.3
    k = torch.arange(n + 1, dtype=torch.float64)
    weights = torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.float64)).log_prob(k).exp()
    want = float((weights * (n - k))[1:n].sum())
    assert abs(utility(torch.tensor([n]), torch.tensor([p], dtype=torch.float64)) - want) < 1e-12


@settings(max_examples=25, deadline=None)
@given(p=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.35, 0.5, 0.9, 1.0]), min_size=0, max_size=4),
       low=st.integers(1, 3), spread=st.integers(0, 6), spare=st.integers(0, 20),
       method=st.sampled_from(["exact", "greedy"]))
def test_matches_reference_and_brute_force(p, low, spread, spare, method):
    p = torch.tensor(p, dtype=torch.float64)
    budget, high = low * len(p) + spare, low + spread
    counts = allocate_rollouts(p, budget, low=low, high=high, method=method)
    want = reference.allocate_rollouts(p, budget, low=low, high=high, method=method)
    assert counts.dtype == torch.int64 and counts.shape == p.shape
    assert counts.sum() <= budget and ((counts >= low) & (counts <= high)).all()
    assert abs(utility(counts, p) - utility(want, p)) < 1e-9
    if method == "exact":
        plans = (c for c in itertools.product(range(low, high + 1), repeat=len(p)) if sum(c) <= budget)
        assert utility(counts, p) >= max(utility(torch.tensor(c), p) for c in plans) - 1e-9


def test_never_worse_than_greedy():
    generator = torch.Generator().manual_seed(0)
    worse = 0
    for _ in range(50):
        p = torch.rand(3, generator=generator, dtype=torch.float64) ** 2
        exact, greedy = (utility(allocate_rollouts(p, 24, method=m), p) for m in ("exact", "greedy"))
        assert exact >= greedy - 1e-12
        worse += greedy < exact - 1e-9
    assert worse > 0


def test_dtypes_and_views():
    p = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(allocate_rollouts(p.to(dtype), 100), allocate_rollouts(p.to(dtype).double(), 100))
    assert torch.equal(allocate_rollouts(p[::2], 60), allocate_rollouts(p[::2].clone(), 60))


def test_bad_input():
    p = torch.tensor([0.1, 0.2])
    for args, error, message in [
        (([0.1], 4), TypeError, "p must be a torch.Tensor"),
        ((p[None], 4), ValueError, r"p must have shape \(prompts,\)"),
        ((p, 3), ValueError, r"budget must be at least low \* len\(p\) = 4, got 3"),
        ((p * 9, 8), ValueError, r"p must be in \[0, 1\], got 1.8"),
        ((p * torch.nan, 8), ValueError, r"p must be in \[0, 1\]"),
        ((p.to("meta"), 8), ValueError, "p must be on the CPU"),
    ]:
        with pytest.raises(error, match=message):
            allocate_rollouts(*args)
    with pytest.raises(ValueError, match="method must be one of"):
        allocate_rollouts(p, 8, method="best")
    for low, high in ((0, 4), (3, 2), (1, 70000)):
        with pytest.raises(ValueError, match="low and high must hold"):
            allocate_rollouts(p, 8, low=low, high=high)
