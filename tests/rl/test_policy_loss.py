import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import policy_loss, reference
from gradops.rl._policy_kinds import AGGREGATES, KINDS, KL, LEVELS, OBJECTIVES, bounds, resolve

LENGTHS = [37, 1, 0, 300, 16, 5]
# float32: each token is rounded a few times, ratios of whole sequences (log-ratios of a few units) once more
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


def batch(dtype=torch.float64, lengths=LENGTHS, seed=0, device="cpu"):
    """Packed tokens: logp, old_logp, ref_logp, mask, is_weights, cu_seqlens."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -3 * torch.rand(n, generator=g, dtype=torch.float64)
    # The drift of a sequence shrinks with its length, so that ratios of whole sequences stay near 1.
    drift = torch.cat([torch.randn(k, generator=g, dtype=torch.float64) / max(k, 4) ** 0.5 for k in lengths])
    ref = logp + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)
    mask = torch.rand(n, generator=g) > 0.3
    weights = 2 * torch.rand(n, generator=g, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return [x.to(device, dtype) if x.is_floating_point() else x.to(device)
            for x in (logp, logp - drift, ref, mask, weights, cu_seqlens)]  # fmt: skip


def advantages(n, dtype, device="cpu"):
    return torch.randn(n, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(device, dtype)


def raw(ops, logp, old_logp, adv, *, cu_seqlens=None, mask=None, ref_logp=None, is_weights=None, kind="grpo", kl=None,
        beta=0.0, level=None, aggregate=None, normalizer=None):
    """The op itself: loss, gradient, statistics."""
    rule = resolve(kind, level=level, clip_low=None, clip_high=None, dual_clip=None, weight_cap=5.0, tau=(1.0, 1.05),
                   has_ref=ref_logp is not None, kl=kl, beta=beta, aggregate=aggregate, normalizer=normalizer)
    totals, dlogp = ops.policy_loss(
        logp, old_logp, adv, cu_seqlens, mask, ref_logp, is_weights, OBJECTIVES.index(rule.objective),
        LEVELS.index(rule.level), KL.index(rule.kl), AGGREGATES.index(rule.aggregate),
        [*bounds(rule), 5.0, 1.0, 1.05, rule.beta, rule.normalizer or 0.0])
    return totals[0], dlogp * totals[1], totals[2:]


def exact(logp, old_logp, adv, **options):
    """The reference in float64: loss, gradient, statistics."""
    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    logp = logp.double().clone().requires_grad_()
    options = {k: double(v) for k, v in options.items()}
    loss, stats = reference.policy_loss(logp, double(old_logp), double(adv), **options)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], torch.stack(stats)


def assert_same(got, want, tolerance):
    (loss, grad, stats), (true_loss, true_grad, true_stats) = got, want
    # The loss is a sum with cancellation: relative to its size before, about 1.
    assert abs(loss.double() - true_loss) <= tolerance * (1 + abs(true_loss))
    assert (grad.double() - true_grad).norm() <= tolerance * true_grad.norm()
    torch.testing.assert_close(stats.double(), true_stats, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64(backend, kind, dtype):
    device, ops = backend
    logp, old, ref, mask, weights, cu = batch(dtype, device=device)
    cases = [
        (False, False, {}),
        (True, True, {"is_weights": weights, "aggregate": "sequence_mean"}),
        (False, True, {"is_weights": weights[: len(LENGTHS)], "ref_logp": ref, "beta": 0.1, "aggregate": "sum"}),
        (True, False, {"ref_logp": ref, "beta": 0.1, "normalizer": 100.0}),
    ]
    for i, level in enumerate(LEVELS[:1] if kind == "reinforce" else LEVELS):
        for j, (per_token, masked, options) in enumerate(cases):
            if ops is not torch.ops.gradops and (i + j + (dtype == torch.float32)) % 3:
                continue  # the emulator is slow
            options = options | {"kind": kind, "level": level, "cu_seqlens": cu, "mask": mask if masked else None}
            if kind == "dr_grpo":
                options |= {"normalizer": 50.0}
            adv = advantages(len(logp) if per_token else len(LENGTHS), dtype, device)
            want = exact(logp, old, adv, **options)
            assert_same(raw(ops, logp, old, adv, **options), want, TOLERANCE[dtype])


@pytest.mark.parametrize("kl", KL[1:])
def test_kl_estimators(backend, kl):
    device, ops = backend
    logp, old, ref, mask, _, cu = batch(device=device)
    for level in ("token", "geometric"):
        options = {"cu_seqlens": cu, "mask": mask, "ref_logp": ref, "kl": kl, "beta": 0.5, "level": level}
        adv = advantages(len(LENGTHS), logp.dtype, device)
        assert_same(raw(ops, logp, old, adv, **options), exact(logp, old, adv, **options), 1e-12)


def test_k3_keeps_its_digits_near_zero():
    logp = torch.full((1, 4), -1.0)
    ref = logp + torch.tensor([2.0**-12, -(2.0**-12), 2.0**-8, 0])  # here exp(u) - 1 - u in float32 has no digit left
    _, stats = policy_loss(logp, logp, torch.zeros(1), ref_logp=ref)
    u = (ref - logp).double()
    torch.testing.assert_close(stats.ref_kl, (u.expm1() - u).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_aggregates(aggregate):
    logp, old, _, mask, _, cu = batch()
    adv = advantages(len(LENGTHS), logp.dtype)
    for options in ({}, {"mask": mask}, {"normalizer": 12.5}):
        options |= {"cu_seqlens": cu, "aggregate": aggregate}
        assert_same(raw(torch.ops.gradops, logp, old, adv, **options), exact(logp, old, adv, **options), 1e-12)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), kind=st.sampled_from(sorted(KINDS)),
       level=st.sampled_from(LEVELS), masked=st.booleans(), weighted=st.booleans(), seed=st.integers(0, 99),
       aggregate=st.sampled_from(AGGREGATES))
def test_any_lengths(lengths, kind, level, masked, weighted, seed, aggregate):
    logp, old, ref, mask, weights, cu = batch(torch.float32, lengths, seed)
    level = "token" if kind == "reinforce" else level
    options = {"cu_seqlens": cu, "mask": mask if masked else None, "is_weights": weights if weighted else None,
               "kind": kind, "level": level, "aggregate": aggregate, "ref_logp": ref, "beta": 0.1}  # fmt: skip
    adv = advantages(len(logp), logp.dtype)
    assert_same(raw(torch.ops.gradops, logp, old, adv, **options), exact(logp, old, adv, **options), 1e-5)


def padded(x, cu, length, fill):
    out = torch.full((len(cu) - 1, length), fill, dtype=x.dtype, device=x.device)
    for row, (a, b) in zip(out, pairwise(cu), strict=True):
        row[: b - a] = x[a:b]
    return out


@pytest.mark.parametrize("kind", ["grpo", "gspo", "minirl", "sapo"])
def test_padded_is_packed_bit_by_bit(kind):
    logp, old, ref, mask, weights, cu = batch(torch.float32)
    adv = advantages(len(LENGTHS), logp.dtype)
    options = {"kind": kind, "beta": 0.1}
    loss, grad, stats = raw(torch.ops.gradops, logp, old, adv, cu_seqlens=cu, mask=mask, ref_logp=ref,
                            is_weights=weights, **options)  # fmt: skip
    logp2, old2, ref2, weights2 = (padded(x, cu, 301, torch.nan) for x in (logp, old, ref, weights))
    mask2 = padded(mask, cu, 301, False)
    loss2, grad2, stats2 = raw(torch.ops.gradops, logp2, old2, adv, mask=mask2, ref_logp=ref2, is_weights=weights2,
                               **options)  # fmt: skip
    assert torch.equal(loss, loss2) and torch.equal(padded(grad, cu, 301, 0), grad2)
    assert torch.equal(torch.cat([stats[:7], stats[8:]]), torch.cat([stats2[:7], stats2[8:]]))  # [7]: masked fraction
    single = [raw(torch.ops.gradops, logp[a:b], old[a:b], adv[i : i + 1], cu_seqlens=torch.tensor([0, b - a]),
                  mask=mask[a:b], ref_logp=ref[a:b], is_weights=weights[a:b], aggregate="sum", **options)[1]
              for i, (a, b) in enumerate(pairwise(cu))]  # fmt: skip
    together = raw(torch.ops.gradops, logp, old, adv, cu_seqlens=cu, mask=mask, ref_logp=ref, is_weights=weights,
                   aggregate="sum", **options)[1]  # fmt: skip
    assert torch.equal(torch.cat(single), together)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"dr_grpo"}))
def test_what_is_masked_may_be_anything(backend, kind):
    device, ops = backend
    logp, old, ref, mask, weights, cu = batch(torch.float32, device=device)
    adv = advantages(len(logp), logp.dtype, device)
    want = raw(ops, logp, old, adv, cu_seqlens=cu, mask=mask, ref_logp=ref, beta=0.1, is_weights=weights, kind=kind)
    for bad in (torch.nan, -torch.inf):
        spoiled = [x.masked_fill(~mask, bad) for x in (logp, old, adv, ref, weights)]
        got = raw(ops, *spoiled[:3], cu_seqlens=cu, mask=mask, ref_logp=spoiled[3], beta=0.1, is_weights=spoiled[4],
                  kind=kind)  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"dr_grpo"}))
def test_nothing_to_learn_from(backend, kind):
    device, ops = backend
    for shape in ((0, 5), (3, 0), (3, 5)):
        x = torch.full(shape, torch.nan, device=device)
        loss, grad, stats = raw(ops, x, x, x, mask=torch.zeros(shape, dtype=torch.bool, device=device), kind=kind)
        assert loss == 0 and (grad == 0).all() and grad.shape == shape and (stats[:7] == 0).all()
    x = torch.zeros(0, device=device)
    loss, grad, _ = raw(ops, x, x, x, cu_seqlens=torch.zeros(1, dtype=torch.int64, device=device), kind=kind)
    assert loss == 0 and grad.shape == (0,)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"dr_grpo"}))
def test_far_off_policy(backend, kind):
    device, ops = backend
    old = torch.full((4, 3), -1.0, device=device)
    logp = old + torch.tensor([1000.0, -1000.0, 100.0], device=device)
    adv = torch.tensor([1.0, -1.0, 0.0, 2.0], device=device)
    for level in LEVELS[:1] if kind == "reinforce" else LEVELS:
        loss, grad, _ = raw(ops, logp, old, adv, kind=kind, level=level)
        assert not loss.isnan() and not grad.isnan().any()
        assert (grad[2] == 0).all()
    loss, grad, _ = raw(ops, logp[:1], old[:1], adv[:1], kind="dapo", aggregate="sum")  # clipped, 0 and clipped
    torch.testing.assert_close(loss.item(), -2 * 1.28, rtol=1e-6, atol=0)
    assert (grad == 0).all()


def test_nan_stays_in_its_sequence(backend):
    device, ops = backend
    logp, old, _, _, _, cu = batch(torch.float32, device=device)
    adv = advantages(len(LENGTHS), logp.dtype, device)
    for kind, level in (("grpo", "token"), ("gspo", "geometric"), ("ppo", "token"), ("cispo", "token")):
        options = {"cu_seqlens": cu, "kind": kind, "level": level}
        want = raw(ops, logp, old, adv, **options)[1]
        spoiled = logp.clone()
        spoiled[50] = torch.nan
        loss, grad, _ = raw(ops, spoiled, old, adv, **options)
        assert loss.isnan()
        inside = torch.zeros_like(logp, dtype=torch.bool)
        inside[38:338] = level == "geometric"
        inside[50] = True
        assert grad[inside].isnan().all() and torch.equal(grad[~inside], want[~inside])


@pytest.mark.parametrize("sign", [1, -1])
def test_signs_and_clips(sign):
    """The gradient stops where the clip holds and nowhere else; its sign is that of -A."""
    ratios = torch.tensor([[0.5, 0.81, 1.0, 1.19, 1.5, 4.0]], dtype=torch.float64)
    adv = torch.full((1,), float(sign), dtype=torch.float64)
    loss, grad, stats = raw(torch.ops.gradops, ratios.log(), torch.zeros_like(ratios), adv, kind="ppo", aggregate="sum")
    clipped = torch.tensor([[0.5, 0.81, 1, 1.19, 1.2, 1.2]] if sign > 0 else [[0.8, 0.81, 1, 1.19, 1.5, 3]])
    moving = torch.tensor([[1, 1, 1, 1, 0, 0]] if sign > 0 else [[0, 1, 1, 1, 1, 0]])
    torch.testing.assert_close(loss, -sign * clipped.sum().double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(grad, -sign * ratios * moving)
    counts = (stats[:3] * 6).round().tolist()
    assert counts == ([0, 2, 0] if sign > 0 else [1, 0, 1])


def test_on_policy():
    logp, _, _, _, _, cu = batch()
    adv = advantages(len(LENGTHS), logp.dtype)
    for kind in set(KINDS) - {"dr_grpo"}:
        x, y = logp.clone().requires_grad_(), logp.clone().requires_grad_()
        loss, stats = policy_loss(x, None, adv, cu_seqlens=cu, kind=kind)
        want, _ = policy_loss(y, logp, adv, cu_seqlens=cu, kind=kind)
        loss.backward()
        want.backward()
        assert torch.equal(loss, want) and torch.equal(x.grad, y.grad) and x.grad.abs().sum() > 0
        assert stats.ratio == 1 and stats.kl_k1 == 0 and stats.clip_high == 0


def test_16_bit():
    logp, old, ref, mask, _, cu = batch(torch.float32)
    adv = advantages(len(LENGTHS), torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        x = logp.to(dtype).requires_grad_()
        y = logp.to(dtype).float().requires_grad_()
        options = {"cu_seqlens": cu, "mask": mask, "ref_logp": ref, "beta": 0.1}
        loss, _ = policy_loss(x, old, adv, **options)
        want, _ = policy_loss(y, old, adv, **options)
        loss.backward()
        want.backward()
        assert loss.dtype == torch.float32 and torch.equal(loss, want)
        assert x.grad.dtype == dtype and torch.equal(x.grad, y.grad.to(dtype))


def test_strides_masks_and_offsets_of_any_kind():
    logp, old, _, mask, _, cu = batch()
    adv = advantages(len(LENGTHS), logp.dtype)
    want = policy_loss(logp, old, adv, cu_seqlens=cu, mask=mask)[0]
    wide = torch.stack([logp, old], 1)
    for got in (
        policy_loss(wide[:, 0], wide[:, 1], adv[:, None].expand(-1, 3)[:, 1], cu_seqlens=cu, mask=mask),
        policy_loss(logp, old, adv, cu_seqlens=cu.int(), mask=mask.float()),
        policy_loss(logp, old.expand(1, -1)[0], adv, cu_seqlens=cu, mask=mask.long()),
    ):
        assert torch.equal(got[0], want)
    table = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(policy_loss(table.t(), table.t() * 0.9, adv[:4])[0],
                               policy_loss(table.t().clone(), table.t().clone() * 0.9, adv[:4])[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"dr_grpo", "cispo", "minirl"}))  # these have stopped gradients
@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck(kind, level):
    logp, old, ref, mask, weights, cu = batch(lengths=[3, 1, 4])
    if kind == "reinforce" and level != "token":
        return
    for adv in (advantages(8, logp.dtype), advantages(3, logp.dtype)):
        assert torch.autograd.gradcheck(
            lambda x, adv=adv: policy_loss(x, old, adv, cu_seqlens=cu, mask=mask, ref_logp=ref, beta=0.2, kind=kind,
                                           level=level, is_weights=weights)[0],
            (logp.clone().requires_grad_(),), check_forward_ad=True)  # fmt: skip


def test_backward_twice_and_scaled():
    logp, old, _, _, _, cu = batch()
    adv = advantages(len(LENGTHS), logp.dtype)
    x = logp.requires_grad_()
    loss, _ = policy_loss(x, old, adv, cu_seqlens=cu)
    one, = torch.autograd.grad(loss, x, retain_graph=True)
    two, = torch.autograd.grad(2 * loss, x)
    torch.testing.assert_close(two, 2 * one)


def test_normalizer_may_be_a_tensor():
    logp, old, _, _, _, cu = batch()
    adv = advantages(len(LENGTHS), logp.dtype)
    x, y = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    a = policy_loss(x, old, adv, cu_seqlens=cu, kind="dr_grpo", normalizer=torch.tensor([77]))[0]
    b = policy_loss(y, old, adv, cu_seqlens=cu, kind="dr_grpo", normalizer=77)[0]
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(x.grad, y.grad)


def test_mask_against_zero_variance_groups():
    """A sequence of zero advantage counts in the denominators, unless it is masked or the normalizer is given."""
    logp, old, _, _, _, _ = batch(lengths=[6] * 4)
    logp, old = logp.reshape(4, 6), old.reshape(4, 6)
    adv = torch.tensor([1.0, -1.0, 0, 0], dtype=torch.float64)
    keep = (adv != 0)[:, None].expand(4, 6)
    for kind in ("grpo", "dapo"):
        diluted, masked = (policy_loss(logp, old, adv, mask=m, kind=kind)[0] for m in (None, keep))
        torch.testing.assert_close(masked, 2 * diluted)


def test_derivatives_that_are_refused():
    logp, old, ref, _, weights, cu = batch()
    adv = advantages(len(LENGTHS), logp.dtype)
    tensors = {"old_logp": old, "advantages": adv, "ref_logp": ref, "is_weights": weights}
    for name in tensors:
        spoiled = tensors | {name: tensors[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=f"policy_loss: {name} asks for a derivative"):
            policy_loss(logp, cu_seqlens=cu, **spoiled)
    x = logp.clone().requires_grad_()
    grad, = torch.autograd.grad(policy_loss(x, old, adv, cu_seqlens=cu)[0], x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_bad_input():
    x, a = torch.zeros(2, 3), torch.zeros(2)
    for error, match, call in [
        (TypeError, "logp must be a torch.Tensor, got list", lambda: policy_loss([1.0], None, a)),
        (TypeError, "logp must be float64", lambda: policy_loss(x.long(), None, a)),
        (TypeError, "advantages must be a torch.Tensor, got NoneType", lambda: policy_loss(x, None, None)),
        (TypeError, "cu_seqlens must be int32 or int64", lambda: policy_loss(x[0], None, a, cu_seqlens=a)),
        (TypeError, "mask must be a torch.Tensor", lambda: policy_loss(x, None, a, mask=[1])),
        (ValueError, r"logp must be \(B, T\), or \(N,\) with cu_seqlens", lambda: policy_loss(x[0], None, a)),
        (ValueError, r"old_logp must have the shape of logp, \(2, 3\), got \(3,\)", lambda: policy_loss(x, x[0], a)),
        (ValueError, r"advantages must .* one number per sequence, \(2,\), got \(3,\)",
         lambda: policy_loss(x, None, x[0])),
        (ValueError, "mask must have the shape of logp", lambda: policy_loss(x, None, a, mask=a)),
        (ValueError, "kind must be one of 'grpo', .*, got 'trpo'", lambda: policy_loss(x, None, a, kind="trpo")),
        (ValueError, "level must be one of", lambda: policy_loss(x, None, a, level="word")),
        (ValueError, "level must be 'token' for kind='reinforce'",
         lambda: policy_loss(x, None, a, kind="reinforce", level="sequence")),
        (ValueError, "aggregate must be one of", lambda: policy_loss(x, None, a, aggregate="mean")),
        (ValueError, "clip_low must be None for kind='sapo'", lambda: policy_loss(x, None, a, kind="sapo", clip_low=1)),
        (ValueError, "dual_clip must be None for kind='cispo'",
         lambda: policy_loss(x, None, a, kind="cispo", dual_clip=2)),
        (ValueError, "dual_clip must be above 1, got 0.5", lambda: policy_loss(x, None, a, dual_clip=0.5)),
        (ValueError, "clip_high must not be negative", lambda: policy_loss(x, None, a, clip_high=-0.1)),
        (ValueError, "ref_logp must be given", lambda: policy_loss(x, None, a, beta=0.1)),
        (ValueError, "kl must be one of", lambda: policy_loss(x, None, a, ref_logp=x, kl="k4")),
        (ValueError, "normalizer must be given for kind='dr_grpo'", lambda: policy_loss(x, None, a, kind="dr_grpo")),
        (ValueError, "normalizer must be positive, got 0", lambda: policy_loss(x, None, a, normalizer=0)),
        (ValueError, "normalizer must be a number or a tensor of one", lambda: policy_loss(x, None, a, normalizer=a)),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 3], [0, 2], [0, 5], [0, -1, 3], [0, 7, 3]])
def test_offsets_that_lead_elsewhere(offsets):
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 3, got -?\d at index [0-2]"):
        policy_loss(x, x, x, cu_seqlens=torch.tensor(offsets))


def test_infinity_switches_a_clip_off():
    """LongNAP: importance sampling without a clip, summed."""
    logp, old, _, _, _, cu = batch()
    adv = advantages(len(LENGTHS), logp.dtype)
    loss, stats = policy_loss(logp, old, adv, cu_seqlens=cu, clip_low=math.inf, clip_high=math.inf, aggregate="sum")
    torch.testing.assert_close(loss, -((logp - old).exp() * adv.repeat_interleave(cu.diff())).sum())
    assert stats.clip_low == stats.clip_high == stats.clip_dual == 0
