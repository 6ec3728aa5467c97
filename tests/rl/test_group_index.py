import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import group_index, reference

LABELS = {
    "dense": torch.arange(500) % 7,
    "sorted": torch.arange(500) // 9,
    "negative": -(torch.arange(300) % 11) - 5,
    "sparse": (torch.arange(400) * 7919 % 40) * 10**12 - 3,
    "shuffled": torch.randint(-50, 50, (999,), generator=torch.Generator().manual_seed(0)) * 1_000_003,
    "extreme": torch.tensor([-(2**63), 2**63 - 1, 0, -(2**63), 2**63 - 1, -1]),
    "all equal": torch.full((100,), -8),
    "all different": torch.randperm(300, generator=torch.Generator().manual_seed(1)),
    "one": torch.tensor([10**18]),
    "empty": torch.empty(0, dtype=torch.int64),
}


def check(labels, ids, perm, offsets):
    """What the three promise, without the reference."""
    n, groups = len(labels), len(offsets) - 1
    assert ids.dtype == perm.dtype == offsets.dtype == torch.int64 and ids.shape == perm.shape == (n,)
    first: dict[int, int] = {}
    assert ids.tolist() == [first.setdefault(x, len(first)) for x in labels.tolist()]  # by first appearance
    assert groups == len(first) and offsets.tolist() == [0, *torch.bincount(ids, minlength=groups).cumsum(0).tolist()]
    assert perm.sort().values.equal(torch.arange(n))
    assert torch.equal(ids[perm], torch.repeat_interleave(torch.arange(groups), offsets.diff()))  # group by group
    inside = ids[perm].diff() == 0
    assert (perm.diff()[inside] > 0).all()  # and each group's in their order: stable


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels(labels):
    ours = group_index(labels)
    check(labels, *ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference.group_index(labels), strict=True))


@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), max_size=60))
def test_any_labels(labels):
    t = torch.tensor(labels, dtype=torch.int64)
    check(t, *group_index(t))


def test_many_labels():
    """Keys near one another index a table, others are hashed: the numbers are the same."""
    near = torch.randint(0, 3000, (50_000,), generator=torch.Generator().manual_seed(2))
    ours = group_index(near)
    check(near, *ours)
    assert all(torch.equal(a, b) for a, b in zip(group_index(near * (2**40 + 1) - 2**60), ours, strict=True))


def test_dtypes_and_strides():
    labels = LABELS["shuffled"]
    small = labels % 100 - 50
    want = group_index(small)
    table = torch.stack([small, small + 1], 1)
    for same in (small.int(), table[:, 0], small.clone()):
        assert all(torch.equal(a, b) for a, b in zip(group_index(same), want, strict=True))
    assert torch.equal(table[:, 0], small)  # labels are left as they are
    ids, perm, offsets = group_index(small[:1].expand(5))
    assert ids.tolist() == [0] * 5 and perm.tolist() == list(range(5)) and offsets.tolist() == [0, 5]


def test_strings():
    words = ["uid-b", "uid-a", "uid-b", "", "ä"]
    for labels in (words, tuple(words), np.array(words), np.array(words, dtype=object)):
        ids, perm, offsets = group_index(labels)
        assert ids.tolist() == [0, 1, 0, 2, 3] and perm.tolist() == [0, 2, 1, 3, 4]
        assert offsets.tolist() == [0, 2, 3, 4, 5]
    assert [t.tolist() for t in group_index([])] == [[], [], [0]]


def test_bad_input():
    for error, match, bad in [
        (TypeError, "labels must be int32 or int64, got torch.float32", torch.ones(3)),
        (TypeError, "labels must be int32 or int64, got torch.bool", torch.ones(3, dtype=torch.bool)),
        (ValueError, r"labels must have 1 dimension, got shape \(2, 2\)", torch.ones(2, 2, dtype=torch.int64)),
        (ValueError, r"labels must have 1 dimension, got shape \(\)", torch.tensor(3)),
        (TypeError, "labels must be an integer tensor or a sequence of strings, got str", "abc"),
        (TypeError, "labels must be an integer tensor or a sequence of strings, got NoneType", None),
        (TypeError, "labels must be strings", [1, 2]),
        (TypeError, "labels must be strings", ["a", 2]),
    ]:
        with pytest.raises(error, match=match):
            group_index(bad)


def test_threads():
    labels = torch.randint(0, 5000, (60_000,), generator=torch.Generator().manual_seed(3)) * 10**9
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(group_index(labels))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_compile():
    """The number of groups is only known when it runs."""
    compiled = torch.compile(lambda labels: group_index(labels + 1), fullgraph=True, backend="aot_eager")
    for labels in (LABELS["shuffled"], LABELS["dense"]):
        assert all(torch.equal(a, b) for a, b in zip(compiled(labels), group_index(labels + 1), strict=True))
