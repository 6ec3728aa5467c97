import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import reference, segment_trajectories


def history(lengths, seed):
    """Random trajectories: some tokens end a prune call, later calls remove earlier tokens."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    trainable, prunes = torch.rand(n, generator=g) < 0.5, torch.rand(n, generator=g) < 0.2
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    removed_by = torch.full((n,), -1)
    for b, e in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        calls = int(prunes[b:e].sum())
        for t in range(b, e):
            born = int(prunes[b:t].sum())
            if born < calls and torch.rand((), generator=g) < 0.5:
                removed_by[t] = torch.randint(born, calls, (), generator=g)
    return cu_seqlens, trainable, prunes, removed_by


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), min_size=0, max_size=5), seed=st.integers(0, 999), double=st.booleans(),
       index=st.sampled_from([torch.int32, torch.int64]))
def test_matches_reference(lengths, seed, double, index):
    cu_seqlens, trainable, prunes, removed_by = history(lengths, seed)
    ours = segment_trajectories(cu_seqlens.to(index), trainable, prunes, removed_by.to(index), double_count=double)
    want = reference.segment_trajectories(cu_seqlens, trainable, prunes, removed_by, double_count=double)
    for x, y in zip(ours, want, strict=True):
        assert torch.equal(x, y)
    if not double:  # every trainable token is trained exactly once
        assert torch.equal(ours.tokens[ours.mask].sort().values, trainable.nonzero()[:, 0])


def test_an_agent_that_prunes_twice():
    # prompt, tool call, tool output, prune (removes the output), tool call, output, prune (removes both), answer
    roles = "paappaappaa"
    trainable = torch.tensor([r == "a" for r in roles])
    prunes = torch.zeros(11, dtype=torch.bool)
    prunes[[5, 9]] = True
    removed_by = torch.full((11,), -1)
    removed_by[3], removed_by[7] = 0, 1
    removed_by[8] = 1
    args = torch.tensor([0, 11]), trainable, prunes, removed_by
    s = segment_trajectories(*args)
    pieces = [s.tokens[b:e].tolist() for b, e in zip(s.cu_seqlens[:-1], s.cu_seqlens[1:], strict=True)]
    assert pieces == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5, 6, 7, 8, 9], [0, 1, 2, 4, 5, 6, 9, 10]]
    trained = [s.tokens[b:e][s.mask[b:e]].tolist() for b, e in zip(s.cu_seqlens[:-1], s.cu_seqlens[1:], strict=True)]
    assert trained == [[1, 2, 5], [6, 9], [10]]
    assert s.trajectory_ids.tolist() == [0, 0, 0] and s.trajectory_offsets.tolist() == [0, 3]
    twice = segment_trajectories(*args, double_count=True)
    assert twice.tokens[15:][twice.mask[15:]].tolist() == [1, 2, 5, 6, 9, 10]


def test_bad_input():
    good = history([5, 4], 3)
    cu_seqlens, trainable, prunes, removed_by = good
    for change, error, message in [
        ({0: cu_seqlens.float()}, TypeError, "cu_seqlens must be int32 or int64"),
        ({0: cu_seqlens[None]}, ValueError, r"cu_seqlens must have shape \(trajectories \+ 1,\)"),
        ({0: cu_seqlens + 1}, ValueError, "cu_seqlens must rise from 0 to"),
        ({1: trainable.long()}, TypeError, "trainable must be bool"),
        ({1: trainable[None]}, ValueError, r"trainable must have shape \(N,\)"),
        ({2: prunes[:3]}, ValueError, "prunes must have the shape of trainable"),
        ({3: removed_by + 50}, ValueError, "removed_by must be -1 or a prune call"),
        ({3: removed_by - 2}, ValueError, "removed_by must be -1 or a prune call"),
    ]:
        with pytest.raises(error, match=message):
            segment_trajectories(*(change.get(i, x) for i, x in enumerate(good)))
    early = torch.tensor([False, True, False]), torch.tensor([-1, -1, 0])  # removed before it came
    with pytest.raises(ValueError, match="not before the token"):
        segment_trajectories(torch.tensor([0, 3]), early[0], early[0], early[1])
