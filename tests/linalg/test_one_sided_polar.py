import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from gradops.linalg import one_sided_polar, reference


def gaussian(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 7), min_size=2, max_size=4), side=st.sampled_from(["right", "left"]),
       alpha=st.sampled_from([0.0, 0.5, 1.0]), center=st.booleans(), eps=st.sampled_from([1e-8, 0.3]),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_matches_reference(shape, side, alpha, center, eps, dtype):
    x = gaussian(*shape).to(dtype)
    before = x.clone()
    y = one_sided_polar(x, side=side, alpha=alpha, center=center, eps=eps)
    assert y.shape == x.shape and y.dtype == dtype and torch.equal(x, before)
    if not x.numel() or (center and eps < 0.1):
        return  # the reference's Gram matrix, singular after centring, is too inexact to compare with
    side = "right" if shape[-2] >= shape[-1] else "left"  # the other Gram matrix is singular too
    want = reference.one_sided_polar(x.double(), side=side, alpha=alpha, center=center, eps=eps)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_ill_conditioned(eps):
    q, p = torch.linalg.qr(gaussian(30, 10)).Q, torch.linalg.qr(gaussian(10, 10, seed=1)).Q
    s = torch.logspace(0, -9, 10, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        y = one_sided_polar(((q * s) @ p.mT).to(dtype), alpha=0.0, eps=eps)
        want = (q * (s / (s * s + eps).sqrt())) @ p.mT
        torch.testing.assert_close(y.double(), want, rtol=0, atol=tolerance)


def test_scale_zero_and_nonfinite_items():
    x = gaussian(4, 9, 5).float()
    u = one_sided_polar(x, alpha=0.0)
    torch.testing.assert_close(one_sided_polar(x * 1e30, alpha=0.0), u, rtol=1e-5, atol=1e-5)
    assert one_sided_polar(x * 1e-30).isfinite().all()
    x[0], x[1, 2, 3], x[2, 0, 0] = 0, math.nan, math.inf
    y = one_sided_polar(x, alpha=0.0)
    assert (y[0] == 0).all() and y[1:3].isnan().all()
    torch.testing.assert_close(y[3], u[3])


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 2)])
@pytest.mark.parametrize("center", [False, True])
def test_derivatives(shape, center):
    x = gaussian(*shape).requires_grad_()
    f = lambda x: one_sided_polar(x, alpha=0.5, center=center, eps=0.1)
    assert gradcheck(f, (x,), check_forward_ad=True) and gradgradcheck(f, (x,))


def test_compile():
    x = gaussian(3, 5, 4).requires_grad_()
    loss = lambda x: one_sided_polar(x, eps=0.1).sin().sum()
    got, = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("x, options, error, words", [
    (1.0, {}, TypeError, "x must be a torch.Tensor"),
    (torch.ones(3), {}, ValueError, "x must have at least 2 dimensions"),
    (torch.ones(3, 3, dtype=torch.int64), {}, TypeError, "x must be float64"),
    (torch.ones(3, 3, dtype=torch.complex64), {}, TypeError, "x must be float64"),
    (torch.ones(3, 3).to_sparse(), {}, TypeError, "x must be a dense tensor"),
    (torch.ones(3, 3), {"side": "up"}, ValueError, "side must be one of"),
    (torch.ones(3, 3), {"eps": 0.0}, ValueError, "eps must be positive"),
])
def test_bad_input(x, options, error, words):
    with pytest.raises(error, match=words):
        one_sided_polar(x, **options)
