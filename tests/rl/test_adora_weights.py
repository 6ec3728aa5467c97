import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import adora_weights, group_top_k_mask, reference


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 60), rule=st.sampled_from(["paper_vlm", "repo_vl", "repo_llm"]), seed=st.integers(0, 99),
       limit=st.sampled_from([None, 5.0]))
def test_adora_weights_are_the_rule(n, rule, seed, limit):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (n,), generator=g).float()
    lengths = torch.randint(1, 10, (n,), generator=g)
    ids, valid = torch.randint(-9, 0, (n,), generator=g) * 10**15, torch.rand(n, generator=g) < 0.8
    options = {"ids": ids, "rule": rule, "max_length": limit, "valid": valid, "factor": 0.25}
    assert torch.equal(adora_weights(rewards, lengths, **options), reference.adora_weights(rewards, lengths, **options))


def test_adora_without_successes_or_failures():
    rewards, lengths = torch.tensor([1.2, 1.2, 0.0, 0.0]), torch.tensor([3, 4, 5, 6])
    want = {"paper_vlm": [0.1, 0.1, 1, 1], "repo_vl": [0.1, 0.1, 1, 1], "repo_llm": [1, 1, 0.1, 0.1]}
    for rule, weights in want.items():
        assert adora_weights(rewards, lengths, group_size=2, rule=rule).tolist() == torch.tensor(weights).tolist()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 60), k=st.integers(1, 4), seed=st.integers(0, 99), copies=st.booleans(), masked=st.booleans())
def test_top_k_is_the_rule(n, k, seed, copies, masked):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 5, (n,), generator=g) / 4
    rewards[torch.rand(n, generator=g) < 0.1] = torch.nan
    rewards[torch.rand(n, generator=g) < 0.1] = -torch.inf
    options = {"ids": torch.randint(-6, 3, (n,), generator=g) * 10**15, "alpha": 0.3}
    if copies:
        options["duplicates"] = torch.randint(0, 5, (n,), generator=g)
    if masked:
        options["valid"] = torch.rand(n, generator=g) < 0.7
    assert torch.equal(group_top_k_mask(rewards, k, **options), reference.group_top_k_mask(rewards, k, **options))


def test_groups_may_be_given_in_any_way():
    g = torch.Generator().manual_seed(0)
    rewards, lengths = torch.rand(24, generator=g), torch.randint(1, 9, (24,), generator=g)
    ids = torch.arange(24) // 6
    ways = [{"group_size": 6}, {"offsets": torch.arange(0, 25, 6)}, {"ids": ids}, {"ids": (ids // 2, ids % 2)}]
    for a, b in itertools.pairwise(ways):
        assert torch.equal(group_top_k_mask(rewards, 2, **a), group_top_k_mask(rewards, 2, **b))
        assert torch.equal(adora_weights(rewards, lengths, **a), adora_weights(rewards, lengths, **b))


def test_duplicates_share_what_they_are_worth():
    rewards = torch.tensor([1.0, 1.0, 0.9])
    copies = torch.tensor([0, 0, 1])
    assert group_top_k_mask(rewards, 1, group_size=3, duplicates=copies, alpha=0.1).tolist() == [True, False, False]
    assert group_top_k_mask(rewards, 1, group_size=3, duplicates=copies, alpha=1.0).tolist() == [False, False, True]


def test_bad_input():
    r = torch.rand(4)
    for error, match, call in [
        (ValueError, "rule must be one of 'paper_vlm'", lambda: adora_weights(r, r, group_size=2, rule="paper_llm")),
        (ValueError, "lengths must have one entry", lambda: adora_weights(r, r[:3], group_size=2)),
        (ValueError, "rewards must have 1 dimension", lambda: adora_weights(r.reshape(2, 2), r, group_size=2)),
        (RuntimeError, "rewards asks", lambda: adora_weights(r.clone().requires_grad_(), r, group_size=2)),
        (ValueError, "k must be a positive integer, got 0", lambda: group_top_k_mask(r, 0, group_size=2)),
        (ValueError, "alpha must not be negative", lambda: group_top_k_mask(r, 1, group_size=2, alpha=-1.0)),
        (TypeError, "duplicates must be int32 or int64", lambda: group_top_k_mask(r, 1, group_size=2, duplicates=r)),
        (RuntimeError, "rewards asks", lambda: group_top_k_mask(r.clone().requires_grad_(), 1, group_size=2)),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()
