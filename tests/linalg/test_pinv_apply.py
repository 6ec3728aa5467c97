import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.linalg import pinv_apply, reference

EPS32 = 2.0**-23


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spread(rows, cols, smallest=-7.0):
    """Singular values from 1 to 10^smallest."""
    n = min(rows, cols)
    u, v = torch.linalg.qr(randn(rows, n)).Q, torch.linalg.qr(randn(cols, n, seed=1)).Q
    return (u * torch.logspace(0, smallest, n, dtype=torch.float64)) @ v.T


def truncated(x, r, rtol, k=None):
    """The update by a float64 SVD, and the smallest singular value kept, relative to the largest."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    n = int((s > rtol * s[0])[:k].sum())
    return vh[:n].T @ ((u[:, :n].T @ r) / s[:n]), float(s[n - 1] / s[0])


def error(ours, want):
    return float((ours.double() - want).norm() / want.norm())


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("shape", [(47, 900), (900, 47)])
def test_accuracy(shape, rtol):
    """No singular value of these lies within 1e-6 of a cut; were the rank wrong, the error would be about 1."""
    r = randn(shape[0], seed=2)
    x = spread(*shape)
    assert error(pinv_apply(x, r, rtol=rtol), truncated(x, r, rtol)[0]) < 1e-9
    x = x.float()
    want, kept = truncated(x, r, rtol)
    assert error(pinv_apply(x, r, rtol=rtol), want) < 8 * EPS32 / kept


@pytest.mark.parametrize("method", ["auto", "gram", "qr", "svd", "randomized"])
@pytest.mark.parametrize("shape", [(2, 12, 100), (2, 12, 9), (5, 1), (1, 5), (12, 12)])
def test_methods_agree(shape, method):
    x = randn(*shape)
    r = randn(*shape[:-1], seed=1)
    k = min(shape[-2:])
    torch.testing.assert_close(pinv_apply(x, r, k=k, method=method), reference.pinv_apply(x, r, k=k),
                               rtol=1e-9, atol=1e-9)
    split = [shape[-1] // 3, shape[-1] - shape[-1] // 3]
    for a, b in zip(pinv_apply(list(x.split(split, -1)), r, k=k, method=method),
                    reference.pinv_apply(list(x.split(split, -1)), r), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["gram", "qr", "svd", "randomized"])
@pytest.mark.parametrize("shape", [(20, 300), (300, 20)])
def test_k(shape, method):
    x, r = spread(*shape, smallest=-4.0), randn(shape[0], seed=2)
    want = truncated(x, r, 0.0, 6)[0]
    assert error(pinv_apply(x, r, k=6, method=method), want) < 1e-6  # the random subspace: two power iterations
    assert (pinv_apply(x, r, k=0, method=method) == 0).all()


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 6), cols=st.integers(0, 6), batch=st.lists(st.integers(0, 2), max_size=2),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), method=st.sampled_from(["auto", "qr"]))
def test_any_shape(rows, cols, batch, dtype, method):
    x, r = randn(*batch, rows, cols).to(dtype), randn(*batch, rows, seed=1)
    y = pinv_apply(x, r, rtol=1e-6, method=method)
    rounding = {torch.float64: 1e-8, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(y, reference.pinv_apply(x, r, rtol=1e-6), rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("method", ["gram", "qr", "svd", "randomized"])
@pytest.mark.parametrize("shape", [(4, 5, 30), (4, 30, 5)])
def test_zero_gives_zero_and_the_bad_stay_alone(shape, method):
    x, r = randn(*shape), randn(*shape[:-1], seed=1)
    want = pinv_apply(x, r, k=5, method=method)
    x[0], x[1, 2, 3], x[2, 0, 0] = 0, torch.nan, torch.inf
    y = pinv_apply(x, r, k=5, method=method)
    assert (y[0] == 0).all() and y[1:3].isnan().all()
    torch.testing.assert_close(y[3], want[3], rtol=1e-12, atol=1e-12)


def test_known_solutions():
    x, r = randn(6, 40), randn(6, seed=1)
    d = pinv_apply(x, r, rtol=1e-6)
    torch.testing.assert_close(x @ d, r)  # full rank: interpolates
    torch.testing.assert_close(d, torch.linalg.lstsq(x, r[:, None], driver="gelsd").solution[:, 0])
    torch.testing.assert_close(pinv_apply(x[:1], r[:1]), x[0] * r[0] / x[0].square().sum())  # Kaczmarz
    tall = pinv_apply(x.T.contiguous(), d, rtol=1e-6)
    torch.testing.assert_close(x @ (x.T @ tall - d), torch.zeros(6, dtype=x.dtype))  # normal equations


def test_refuses_derivatives_and_bad_input():
    x, r = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(RuntimeError, match=r"pinv_apply: J asks for a derivative"):
        pinv_apply(x.clone().requires_grad_(), r)
    with pytest.raises(RuntimeError, match=r"pinv_apply: J\[1\] asks for a derivative"):
        pinv_apply([x, x.clone().requires_grad_()], r)
    for bad, match in [({"r": torch.ones(3)}, "r must have the shape of J"), ({"rtol": 1.0}, "rtol must be in"),
                       ({"k": -1}, "k must be None or"), ({"method": "lu"}, "method must be one of"),
                       ({"method": "randomized"}, "k must be given for method='randomized'"),
                       ({"J": []}, "J must hold at least one block")]:
        with pytest.raises(ValueError, match=match):
            pinv_apply(**({"J": x, "r": r} | bad))
