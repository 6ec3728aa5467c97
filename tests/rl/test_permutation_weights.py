import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import permutation_weights, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def case(groups, most, longest, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, most + 1, (groups,), generator=g)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    lengths = torch.randint(1, longest + 1, (int(offsets[-1]),), generator=g)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logp = -3 * torch.rand(int(cu_seqlens[-1]), generator=g, dtype=torch.float64)
    return logp.to(dtype), cu_seqlens, offsets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 40), (2, 3, 200), (3, 150, 3)])
def test_matches_float64(backend, shape, dtype):
    device, ops = backend
    logp, cu_seqlens, offsets = case(*shape, dtype)
    got = ops.permutation_weights(*(x.to(device) for x in (logp, cu_seqlens, offsets)), 0.7)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if len(got):
        want = reference.permutation_weights(logp.double(), cu_seqlens, offsets=offsets, tau=0.7)
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-13 if dtype == torch.float64 else 1e-7, atol=0)


@settings(max_examples=20, deadline=None)
@given(groups=st.integers(1, 6), most=st.integers(1, 5), longest=st.integers(1, 20), seed=st.integers(0, 99))
def test_any_shape(groups, most, longest, seed):
    logp, cu_seqlens, offsets = case(groups, most, longest, seed=seed)
    got = permutation_weights(logp, cu_seqlens.int(), offsets=offsets.int())
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, torch.arange(groups).repeat_interleave(
        offsets.diff()), got)
    torch.testing.assert_close(sums, (offsets.diff() > 0).double())
    if len(got):
        torch.testing.assert_close(got, reference.permutation_weights(logp, cu_seqlens, offsets=offsets))


def test_equal_groups_and_extreme_values():
    logp = torch.tensor([-1e4, -1e4, -9999.0, -torch.inf, 0.0, -1.0])
    cu_seqlens = torch.tensor([0, 2, 3, 4, 6])
    got = permutation_weights(logp, cu_seqlens, group_size=2)
    torch.testing.assert_close(got, torch.tensor([0.2689414, 0.7310586, 0.0, 1.0]))
    assert torch.equal(got, permutation_weights(logp, cu_seqlens, offsets=torch.tensor([0, 2, 4])))
    assert permutation_weights(logp[:0], torch.tensor([0]), group_size=3).shape == (0,)


def test_groups_do_not_see_each_other(backend):
    device, ops = backend
    logp, cu_seqlens, offsets = (x.to(device) for x in case(4, 5, 9, torch.float32, seed=3))
    whole = ops.permutation_weights(logp, cu_seqlens, offsets, 1.0)
    for g in range(4):
        b, e = int(offsets[g]), int(offsets[g + 1])
        tokens = logp[int(cu_seqlens[b]):int(cu_seqlens[e])]
        alone = ops.permutation_weights(tokens, cu_seqlens[b:e + 1] - cu_seqlens[b], offsets[g:g + 2] - b, 1.0)
        assert torch.equal(alone, whole[b:e])
    b, e = int(offsets[1]), int(offsets[2])
    logp[int(cu_seqlens[b])] = torch.nan
    poisoned = ops.permutation_weights(logp, cu_seqlens, offsets, 1.0)
    assert poisoned[b:e].isnan().all()
    assert torch.equal(poisoned[:b], whole[:b]) and torch.equal(poisoned[e:], whole[e:])


BAD = [([0, 2, 1, 6], [0, 3]), ([0, 2, 9, 6], [0, 3]), ([-1, 2, 4, 6], [0, 3]), ([0, 2, 2, 6], [0, 3]),
       ([0, 2, 4, 5], [0, 3]), ([0, 2, 4, 6], [0, 4]), ([0, 2, 4, 6], [0, 2]), ([0, 2, 4, 6], [1, 3]),
       ([0, 2, 4, 6], [0, 4, 3])]


@pytest.mark.parametrize("cu_seqlens, offsets", BAD)
def test_bad_offsets_on_the_cpu(cu_seqlens, offsets):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 6, and no|offsets must rise from 0 to 3, got"):
        permutation_weights(torch.zeros(6), torch.tensor(cu_seqlens), offsets=torch.tensor(offsets))


@pytest.mark.parametrize("cu_seqlens, offsets", BAD)
def test_bad_offsets_stay_in_bounds_on_cuda(cuda_backend, cu_seqlens, offsets):
    device, ops = cuda_backend
    ops.permutation_weights(torch.zeros(6, device=device), torch.tensor(cu_seqlens, device=device),
                            torch.tensor(offsets, device=device), 1.0)


def test_bad_input():
    logp, cu_seqlens, offsets = case(3, 4, 5, seed=1)
    with pytest.raises(TypeError, match="answer_logp must be a torch.Tensor, got list"):
        permutation_weights([0.0], cu_seqlens, offsets=offsets)
    with pytest.raises(ValueError, match="cu_seqlens must have 1 dimension"):
        permutation_weights(logp, cu_seqlens[None], offsets=offsets)
    with pytest.raises(ValueError, match="one of offsets and group_size"):
        permutation_weights(logp, cu_seqlens)
    with pytest.raises(ValueError, match="one of offsets and group_size"):
        permutation_weights(logp, cu_seqlens, offsets=offsets, group_size=2)
    with pytest.raises(ValueError, match="group_size must be positive and divide"):
        permutation_weights(torch.zeros(3), torch.arange(4), group_size=2)
    with pytest.raises(TypeError, match=r"offsets must be int32 or int64, got torch.float32"):
        permutation_weights(logp, cu_seqlens, offsets=offsets.float())
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        permutation_weights(logp, cu_seqlens, offsets=offsets, tau=0)
    with pytest.raises(RuntimeError, match="answer_logp asks for a derivative"):
        permutation_weights(logp.requires_grad_(), cu_seqlens, offsets=offsets)
