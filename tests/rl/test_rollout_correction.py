import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import reference, rollout_correction
from gradops.rl._policy_kinds import LEVELS
from gradops.rl.rollout_correction import MODES

LENGTHS = [37, 1, 0, 300, 16, 5]


def batch(dtype=torch.float64, lengths=LENGTHS, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(sum(lengths), generator=g, dtype=torch.float64)
    rollout = old + torch.randn(len(old), generator=g, dtype=torch.float64) / 4
    mask = torch.rand(len(old), generator=g) > 0.3
    return (old.to(device, dtype), rollout.to(device, dtype), mask.to(device),
            torch.tensor([0, *lengths]).cumsum(0).to(device))  # fmt: skip


def raw(ops, old, rollout, cu, mask, mode, low, high, veto):
    level, action = mode.split("_")
    return ops.rollout_correction(old, rollout, cu, mask, LEVELS.index(level), action == "mask", low or 0.0,
                                  high or math.inf, -math.inf if veto is None else math.log(veto))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_matches_float64(backend, mode, dtype):
    device, ops = backend
    old, rollout, mask, cu = batch(dtype, device=device)
    for m in (None, mask):
        for low, high, veto in ((None, 1.2, None), (0.9, 1.1, None), (0.9, None, 0.5)):
            weights, keep = raw(ops, old, rollout, cu, m, mode, low, high, veto)
            want, kept = reference.rollout_correction(old.double(), rollout.double(), cu_seqlens=cu, mask=m, mode=mode,
                                                      low=low, high=high, veto=veto)  # fmt: skip
            assert torch.equal(keep, kept) and weights.dtype == dtype
            # float32: each log-ratio is rounded, and a sequence has 300 of them
            tolerance = 1e-12 if dtype == torch.float64 else 3e-5 if mode.startswith("sequence") else 1e-6
            torch.testing.assert_close(weights.double(), want, rtol=tolerance, atol=0)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), mode=st.sampled_from(MODES), masked=st.booleans(),
       seed=st.integers(0, 99))
def test_any_lengths(lengths, mode, masked, seed):
    old, rollout, mask, cu = batch(torch.float64, lengths, seed)
    options = {"cu_seqlens": cu, "mask": mask if masked else None, "mode": mode, "low": 0.8, "high": 1.2, "veto": 0.6}
    weights, keep = rollout_correction(old, rollout, **options)
    want, kept = reference.rollout_correction(old, rollout, **options)
    assert torch.equal(keep, kept)
    torch.testing.assert_close(weights, want, rtol=1e-12, atol=0)


def test_padded_is_packed_bit_by_bit():
    old, rollout, _, cu = batch(torch.float32, [20, 5, 33])
    mask = torch.arange(40) < cu.diff()[:, None]
    for mode in MODES:
        options = {"mode": mode, "low": 0.9, "veto": 1e-3}
        wide = [torch.full((3, 40), torch.nan).masked_scatter(mask, x) for x in (old, rollout)]
        weights, keep = rollout_correction(*wide, mask=mask, **options)
        want, kept = rollout_correction(old, rollout, cu_seqlens=cu, **options)
        assert torch.equal(weights[mask], want) and torch.equal(keep[mask], kept)
        assert not weights[~mask].any() and not keep[~mask].any()


def test_dr_kernel():
    """Sequences stay whole: one drifts as a whole, one has a single token that the policy would hardly choose."""
    rollout = torch.full((4, 1000), -1.0)
    old = rollout.clone()
    old[1] += 0.002
    old[2, 7], old[2, 8] = -11.0, 9.0  # their mean is 0
    old[3, 0] += 0.5
    _, keep = rollout_correction(old, rollout, mode="geometric_mask", low=0.999, high=1.001, veto=1e-4)
    assert keep.all(1).tolist() == [True, False, False, True] == keep.any(1).tolist()


def test_extremes(backend):
    device, ops = backend
    old = torch.tensor([[1000.0, -1000.0, 0.0, torch.nan]], device=device)
    zero = torch.zeros_like(old)
    weights, keep = raw(ops, old, zero, None, None, "token_truncate", None, 2.0, None)
    assert weights[0, :3].tolist() == [2, 0, 1] and weights[0, 3].isnan() and keep.all()
    weights, keep = raw(ops, old, zero, None, None, "token_mask", 0.5, 2.0, None)
    assert weights.tolist() == [[0, 0, 1, 0]] and keep.tolist() == [[False, False, True, False]]
    for shape in ((0, 3), (3, 0)):
        x = torch.zeros(shape, device=device)
        assert raw(ops, x, x, None, None, "geometric_mask", 0.5, 2.0, 0.1)[0].shape == shape


def test_16_bit_and_masks_of_numbers():
    old, rollout, mask, cu = batch(torch.float32)
    weights, _ = rollout_correction(old.bfloat16(), rollout, cu_seqlens=cu.int(), mask=mask.long())
    want, _ = rollout_correction(old.bfloat16().float(), rollout, cu_seqlens=cu, mask=mask)
    assert weights.dtype == torch.float32 and torch.equal(weights, want)


def test_bad_input():
    x = torch.zeros(2, 3)
    for error, match, call in [
        (TypeError, "old_logp must be a torch.Tensor", lambda: rollout_correction(None, x)),
        (TypeError, "rollout_logp must be float64", lambda: rollout_correction(x, x.long())),
        (ValueError, "rollout_logp must have the shape of old_logp", lambda: rollout_correction(x, x[0])),
        (ValueError, r"old_logp must be \(N,\) with cu_seqlens",
         lambda: rollout_correction(x, x, cu_seqlens=torch.tensor([0, 6]))),
        (ValueError, "mode must be one of 'token_truncate', .*, got 'tis'",
         lambda: rollout_correction(x, x, mode="tis")),
        (ValueError, "low and high must be 0 <= low <= high, got 3 and 2",
         lambda: rollout_correction(x, x, low=3, high=2)),
        (ValueError, "veto must be between 0 and 1, got 2", lambda: rollout_correction(x, x, veto=2)),
        (RuntimeError, "old_logp asks for a derivative", lambda: rollout_correction(x.clone().requires_grad_(), x)),
        (ValueError, "cu_seqlens must rise from 0 to 3, got 4 at index 1",
         lambda: rollout_correction(x[0], x[0], cu_seqlens=torch.tensor([0, 4]))),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()
