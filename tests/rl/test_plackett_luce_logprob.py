from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import plackett_luce_logprob, reference

SHAPES = [(1, 1, 1), (3, 5, 5), (4, 9, 3), (2, 40, 33), (2, 70, 70), (2, 6, 0), (0, 4, 2), (3, 200, 5)]


def case(rows, n, k, dtype=torch.float64, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = (scale * torch.randn(rows, n, generator=g, dtype=torch.float64)).to(dtype)
    return scores, torch.rand(rows, n, generator=g).argsort(-1)[:, :k]


def gradient(scores, permutation):
    scores = scores.double().requires_grad_()
    return torch.autograd.grad(reference.plackett_luce_logprob(scores, permutation).sum(), scores)[0]


@pytest.mark.parametrize("scale", [2.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, shape, dtype, scale):
    device, ops = backend
    scores, permutation = case(*shape, dtype, scale)
    got = ops.plackett_luce_logprob(scores.to(device), permutation.to(device)).cpu()
    assert got.dtype == dtype and got.shape == shape[:1]
    rounding = 1e-13 if dtype == torch.float64 else 1e-6
    # every term of the sum is at most 0, so nothing cancels
    torch.testing.assert_close(got.double(), reference.plackett_luce_logprob(scores.double(), permutation),
                               rtol=rounding, atol=rounding)
    got = ops.plackett_luce_gradient(scores.to(device), permutation.to(device)).cpu()
    want = gradient(scores, permutation)
    # up to k probabilities add up to an entry
    assert ((got.double() - want).abs() <= rounding * (2 + want.abs())).all()


def ragged(permutation, seed=0):
    rows, k = permutation.shape
    ends = torch.randint(0, k + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(k) < ends, permutation, -1 - permutation), ends


def test_rankings_of_different_lengths(backend):
    device, ops = backend
    scores, permutation = case(6, 50, 40)
    cut, ends = ragged(permutation)
    got = ops.plackett_luce_logprob(scores.to(device), cut.to(device)).cpu()
    slope = ops.plackett_luce_gradient(scores.to(device), cut.to(device)).cpu()
    for i, k in enumerate(ends.flatten().tolist()):
        torch.testing.assert_close(got[i], reference.plackett_luce_logprob(scores[i], permutation[i, :k]))
        torch.testing.assert_close(slope[i:i + 1], gradient(scores[i:i + 1], permutation[i:i + 1, :k]))
    torch.testing.assert_close(got, reference.plackett_luce_logprob(scores, cut))


def test_probabilities_of_all_rankings_add_up_to_one(backend):
    device, ops = backend
    scores, _ = case(1, 4, 1)
    for k in (4, 2):
        every = torch.tensor(sorted({p[:k] for p in permutations(range(4))}))
        logp = ops.plackett_luce_logprob(scores.expand(len(every), 4).to(device), every.to(device))
        torch.testing.assert_close(logp.exp().sum().item(), 1.0)


def test_an_item_of_score_minus_infinity_is_not_there(backend):
    device, ops = backend
    scores, permutation = case(1, 6, 6)
    keep = permutation[0][permutation[0] != 2]
    scores[0, 2] = -torch.inf
    shorter, renumbered = scores[:, [0, 1, 3, 4, 5]], torch.where(keep > 2, keep - 1, keep)[None]
    for k in (5, 3, 0):
        args = scores.to(device), keep[None, :k].contiguous().to(device)
        torch.testing.assert_close(ops.plackett_luce_logprob(*args).cpu(),
                                   reference.plackett_luce_logprob(shorter, renumbered[:, :k]))
        slope = ops.plackett_luce_gradient(*args).cpu()
        torch.testing.assert_close(slope[:, [0, 1, 3, 4, 5]], gradient(shorter, renumbered[:, :k]))
        assert slope[0, 2] == 0
    for impossible in (permutation, torch.tensor([[2, 0]]), torch.cat([keep, torch.tensor([2])])[None]):
        assert ops.plackett_luce_logprob(scores.to(device), impossible.to(device)).item() == -torch.inf
    assert ops.plackett_luce_logprob(torch.full((1, 3), -torch.inf, device=device),
                                     torch.tensor([[1]], device=device)).item() == -torch.inf


def test_nan_stays_in_its_row(backend):
    device, ops = backend
    scores, permutation = (x.to(device) for x in case(4, 45, 40, torch.float32))
    before = ops.plackett_luce_logprob(scores, permutation), ops.plackett_luce_gradient(scores, permutation)
    scores[1, permutation[1, 7]] = torch.nan
    scores[2, permutation[2].sort()[0].diff().argmax() + 1] = torch.nan
    for f, want in zip((ops.plackett_luce_logprob, ops.plackett_luce_gradient), before, strict=True):
        got = f(scores, permutation)
        assert torch.equal(got[[0, 3]], want[[0, 3]])
        assert got[1].isnan().any() and got[2].isnan().any()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 4), n=st.integers(1, 20), part=st.floats(0, 1), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_any_shape(rows, n, part, seed, dtype):
    scores, permutation = case(rows, n, round(part * n), dtype, seed=seed)
    got = plackett_luce_logprob(scores, permutation)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = reference.plackett_luce_logprob(scores.double(), permutation)
    rounding = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding)


def test_broadcast_strides_and_batches():
    scores, permutation = case(6, 8, 4)
    want = plackett_luce_logprob(scores, permutation)
    assert torch.equal(plackett_luce_logprob(scores.mT.contiguous().mT, permutation.int()), want)
    assert torch.equal(plackett_luce_logprob(scores.reshape(2, 3, 8), permutation.reshape(2, 3, 4)), want.reshape(2, 3))
    assert all(torch.equal(plackett_luce_logprob(scores[i], permutation[i]), want[i]) for i in range(6))
    many = plackett_luce_logprob(scores[0], permutation)
    assert torch.equal(many, plackett_luce_logprob(scores[:1].expand(6, 8), permutation)) and many.shape == (6,)
    x = scores[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(plackett_luce_logprob(x, permutation).sum(), x)[0],
                               gradient(scores[:1].expand(6, 8), permutation).sum(0))


@pytest.mark.parametrize("n, k", [(5, 5), (6, 3), (4, 1)])
def test_derivatives(n, k):
    scores, permutation = case(2, n, k)
    scores.requires_grad_()

    def f(s):
        return plackett_luce_logprob(s, permutation)

    assert torch.autograd.gradcheck(f, (scores,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (scores,), check_fwd_over_rev=True)
    want = torch.func.hessian(lambda s: reference.plackett_luce_logprob(s, permutation).sum())(scores.detach())
    torch.testing.assert_close(torch.func.hessian(lambda s: f(s).sum())(scores.detach()), want)
    third = torch.func.jacfwd(torch.func.jacrev(torch.func.jacrev(lambda s: f(s).sum())))(scores.detach())
    want = torch.func.jacfwd(torch.func.jacrev(torch.func.jacrev(
        lambda s: reference.plackett_luce_logprob(s, permutation).sum())))(scores.detach())
    torch.testing.assert_close(third, want)
    x = scores.detach().float().requires_grad_()
    grad, = torch.autograd.grad(f(x).sum(), x)
    assert grad.dtype == torch.float32


def test_second_derivative_of_rankings_that_end_early():
    scores, permutation = case(3, 6, 5)
    cut, _ = ragged(permutation, 1)
    scores[0, 0] = -40.0
    torch.testing.assert_close(torch.func.hessian(lambda s: plackett_luce_logprob(s, cut).sum())(scores),
                               torch.func.hessian(lambda s: reference.plackett_luce_logprob(s, cut).sum())(scores))


def test_bad_input():
    scores, permutation = case(3, 5, 4)
    for bad in ([1, 2, 1, 0], [0, 1, 2, 5]):
        wrong = permutation.clone()
        wrong[1] = torch.tensor(bad)
        with pytest.raises(ValueError, match="have items below 5, each at most once, got others in row 1"):
            plackett_luce_logprob(scores, wrong)
    with pytest.raises(TypeError, match="scores must be a torch.Tensor, got ndarray"):
        plackett_luce_logprob(np.ones(3), permutation)
    with pytest.raises(TypeError, match=r"permutation must be int32 or int64, got torch.float64"):
        plackett_luce_logprob(scores, scores)
    with pytest.raises(ValueError, match="permutation must have at least 1 dimension"):
        plackett_luce_logprob(scores, torch.tensor(1))
    with pytest.raises(ValueError, match=r"scores \(3, 5\) and permutation \(2, 4\) cannot be broadcast"):
        plackett_luce_logprob(scores, permutation[:2])


def test_items_out_of_range_give_nan_on_cuda(cuda_backend):
    device, ops = cuda_backend
    scores, permutation = (x.to(device) for x in case(3, 5, 4, torch.float32))
    permutation[1, 2] = 5
    got = ops.plackett_luce_logprob(scores, permutation)
    assert got[1].isnan() and got[[0, 2]].isfinite().all()
    assert ops.plackett_luce_gradient(scores, permutation)[1].isnan().all()
