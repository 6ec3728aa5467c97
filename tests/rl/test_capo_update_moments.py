import pytest
import torch

from gradops.rl import capo_update_moments_, reference

from .test_capo_curvature import tokens

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def case(n, k, h, dtype=torch.float64, seed=0, rows=11):
    args, adam = tokens(n, k, h, dtype, seed, rows)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.7
    return [adam["exp_avg"], adam["exp_avg_sq"], *args, adam["token_ids"], mask]


def to(args, device):
    return [x.to(device, copy=True) for x in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 5, 33), (9, 2, 140), (4, 3, 600), (5, 3, 0), (3, 0, 7), (0, 2, 3)])
def test_matches_float64(backend, shape, dtype):
    device, ops = backend
    args = case(*shape, dtype)
    got = to(args, device)
    ops.capo_update_moments_(*got, 0.9, 0.999)
    want = [x.double() if x.is_floating_point() else x.clone() for x in args]
    reference.capo_update_moments_(*want, reduction="sum")
    size = [x.double().abs() if x.is_floating_point() else x.clone() for x in args]
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    for a, b, c in zip(got[:2], want[:2], size[:2], strict=True):
        assert a.dtype == args[0].dtype
        # each entry adds up to some 10 terms of size about 1 here
        assert ((a.cpu().double() - b).abs() <= rounding * (c + 4)).all()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got[2:], args[2:], strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_public_function(reduction):
    args = case(30, 7, 50)
    for batch in ((30,), (5, 6)):
        got = [args[0].clone(), args[1].clone(), *(x.reshape(*batch, *x.shape[1:]) for x in args[2:])]
        want = [args[0].clone(), args[1].clone(), *args[2:]]
        version = got[0]._version, got[1]._version
        assert capo_update_moments_(*got, reduction=reduction, betas=(0.8, 0.95)) is None
        reference.capo_update_moments_(*want, reduction=reduction, betas=(0.8, 0.95))
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])
        assert got[0]._version > version[0] and got[1]._version > version[1]  # autograd may notice


def test_untouched_rows_keep_their_bits(backend):
    device, ops = backend
    args = to(case(6, 3, 20, torch.float32), device)
    args[6] = args[6] % 4 + 5
    before = args[0].clone(), args[1].clone()
    ops.capo_update_moments_(*args, 0.9, 0.999)
    rest = [0, 1, 2, 3, 4, 9, 10]
    assert all(torch.equal(x[rest], y[rest]) for x, y in zip(args, before, strict=False))
    assert not torch.equal(args[0], before[0])
    args[7].zero_()
    before = args[0].clone(), args[1].clone()
    ops.capo_update_moments_(*args, 0.9, 0.999)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=False))


def test_long_segments_keep_their_digits(backend):
    """One row with many tokens, all but cancelling."""
    device, ops = backend
    n = 601 if device == "cuda" or ops is torch.ops.gradops else 67
    hidden = torch.ones(n, 33)
    advantages = torch.tensor([1.0, -1.0]).repeat(n)[:n] * 1000
    m, s = torch.zeros(2, 2, 33)
    ids = torch.zeros(n, 1, dtype=torch.int64)
    args = [m, s, hidden, torch.full((n, 1), 0.3), torch.zeros(n, dtype=torch.int64), advantages, ids,
            torch.ones(n, dtype=torch.bool)]
    args = to(args, device)
    ops.capo_update_moments_(*args, 0.9, 0.999)
    assert (args[0][0] - 70).abs().max() < 1e-3 and (args[0][1] == 0).all()


def test_threads_do_not_change_a_bit():
    args = case(300, 9, 1500, torch.float32, rows=200)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            got = to(args, "cpu")
            capo_update_moments_(*got)
            results.append(got[:2])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_nan_stays_in_its_rows(backend):
    device, ops = backend
    args = to(case(4, 2, 40, torch.float32), device)
    args[6] = torch.arange(8, device=device).reshape(4, 2)
    args[7] = torch.tensor([True, True, False, True], device=device)
    args[2][1, 3], args[2][2, 3] = torch.nan, torch.nan
    ops.capo_update_moments_(*args, 0.9, 0.999)
    for x in args[:2]:
        assert x[2:4, 3].isnan().all() and x.isnan().sum() == 2


def test_bad_indices_change_nothing_on_the_cpu():
    args = case(4, 3, 8)
    args[7][:] = True
    before = args[0].clone()
    for which, bad, words in ((4, 3, "action_index must be below 3, got 3"),
                              (6, -1, r"token_ids must be in \[0, 11\), got -1"),
                              (6, 11, r"token_ids must be in \[0, 11\), got 11")):
        wrong = [x.clone() for x in args]
        wrong[which][2] = bad
        with pytest.raises(ValueError, match=words):
            capo_update_moments_(*wrong)
        assert torch.equal(wrong[0], before)
        wrong[7][2] = False  # where it does not count
        capo_update_moments_(*wrong)


def test_bad_indices_are_ignored_on_cuda(cuda_backend):
    device, ops = cuda_backend
    args = case(4, 3, 8)
    args[7][:] = True
    wrong = to(args, device)
    wrong[6][0, :2] = torch.tensor([-1, 11])
    wrong[4][1] = 3
    ops.capo_update_moments_(*wrong, 0.9, 0.999)
    assert wrong[0].isfinite().all()


def test_bad_input():
    args = case(4, 3, 8)
    with pytest.raises(TypeError, match="mask must be bool, got torch.float64"):
        capo_update_moments_(*args[:7], args[5])
    with pytest.raises(ValueError, match=r"mask must have the shape of advantages, \(4,\), got \(3,\)"):
        capo_update_moments_(*args[:7], args[7][:3])
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'none'"):
        capo_update_moments_(*args, reduction="none")
    with pytest.raises(ValueError, match="betas must be two numbers"):
        capo_update_moments_(*args, betas=(0.9, -1))
    with pytest.raises(ValueError, match="exp_avg must be contiguous"):
        capo_update_moments_(args[0].mT.contiguous().mT, *args[1:])
    with pytest.raises(TypeError, match="exp_avg must be torch.float64"):
        capo_update_moments_(args[0].float(), *args[1:])
    with pytest.raises(RuntimeError, match="requires grad"):
        capo_update_moments_(*args[:2], args[2].clone().requires_grad_(), *args[3:])
