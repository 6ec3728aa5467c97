import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.quant import hessian_factor, hessian_update_, reference


def activations(tokens, n, seed=0):
    """Features of uneven size with a few strong common directions, as in a network."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, dtype=torch.float64, generator=g)
    x = x * torch.exp(1.5 * torch.randn(n, dtype=torch.float64, generator=g))
    common = torch.randn(tokens, 8, dtype=torch.float64, generator=g)
    return x + 5 * common @ torch.randn(8, n, dtype=torch.float64, generator=g)


def hessian(tokens, n, seed=0, dtype=torch.float64):
    x = activations(tokens, n, seed)
    return ((x.mT @ x) * (2 / tokens)).to(dtype)


def relative(u, want):
    return ((u.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 300, 700])
def test_matches_three_factorisations(n, inverse):
    h = hessian(2 * n + 5, n)
    u, damp, info = hessian_factor(h, inverse=inverse)
    want, _, _ = reference.hessian_factor(h, inverse=inverse)
    assert relative(u, want) <= 1e-10 and damp == 0.01 and info == 0  # condition number about 1e4
    assert torch.equal(u, u.triu()) and (u.diagonal() > 0).all()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    residual = u.mT @ u @ damped - torch.eye(n, dtype=h.dtype) if inverse else (u @ u.mT - damped) / damped.norm()
    assert residual.abs().max() <= 1e-9


def test_accuracy_in_float32_and_float64():
    """256 tokens for 512 features: far from full rank before damping."""
    x = activations(256, 512).bfloat16()
    want, _, _ = reference.hessian_factor((x.double().mT @ x.double()) * (2 / 256))
    single, double = torch.zeros(512, 512), torch.zeros(512, 512, dtype=torch.float64)
    hessian_update_(single, x, 0)
    hessian_update_(double, x, 0)
    errors = [relative(hessian_factor(h, factor_dtype=dtype)[0], want)
              for h, dtype in ((single, None), (single, torch.float64), (double, torch.float64))]
    # What three factorisations in float32 lose is the yardstick.
    usual = relative(reference.hessian_factor(x.float().mT @ x.float() * (2 / 256))[0], want)
    assert errors[0] <= 1.5 * usual and errors[1] <= 0.7 * usual and errors[2] <= errors[1]
    assert hessian_factor(single)[0].dtype == torch.float32


def test_each_item_ends_well():
    n = 40
    h = torch.stack([hessian(100, n, seed=k) for k in range(6)])
    h[1, 3, 5] = h[1, 5, 3] = torch.nan
    h[2] = 0
    h[3, 7] = h[3, :, 7] = h[3, 9] = h[3, :, 9] = 0
    h[4] -= 0.05 * h[4].diagonal().mean() * torch.eye(n)  # definite after more damping
    h[5] = -h[5]
    u, damp, info = hessian_factor(h, damp_auto_increment=0.01)
    want, want_damp, want_info = reference.hessian_factor(h, damp_auto_increment=0.01)
    assert info.tolist() == want_info.tolist() == [0, 2, 3, -2, 0, 1] and info.dtype == torch.int32
    torch.testing.assert_close(damp, want_damp, equal_nan=True, rtol=0, atol=0)
    assert damp[4] > 0.01 and damp[[1, 2, 5]].isnan().all()
    for k in (1, 2, 5):
        assert torch.equal(u[k], torch.eye(n, dtype=u.dtype))
    for k in (0, 3, 4):
        assert relative(u[k], want[k]) <= 1e-7
        assert torch.equal(u[k], hessian_factor(h[k], damp_auto_increment=0.01)[0])
    assert (u[3][[7, 9]].count_nonzero(-1) == 1).all()
    assert hessian_factor(h)[2].tolist() == [0, 2, 3, -2, 1, 1]


def test_infinity_in_any_place():
    for place in ((0, 0), (0, 299), (299, 0)):
        h = hessian(600, 300)
        h[place] = torch.inf
        assert hessian_factor(h)[2] == 2


def test_singular_without_damping():
    x = activations(30, 200)
    u, damp, info = hessian_factor(x.mT @ x - 1e-3 * torch.eye(200), damp_percent=0.0)
    assert info == 1 and damp.isnan() and torch.equal(u, torch.eye(200, dtype=u.dtype))


def test_input_is_not_modified_and_may_be_strided():
    h = hessian(100, 60)
    big = torch.zeros(60, 120, dtype=h.dtype)
    big[:, ::2] = h
    before = big.clone()
    assert torch.equal(hessian_factor(big[:, ::2])[0], hessian_factor(h)[0]) and torch.equal(big, before)


@settings(max_examples=25, deadline=None)
@given(batch=st.lists(st.integers(0, 3), max_size=2), n=st.integers(0, 30), inverse=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float64]), out=st.sampled_from([torch.float32, torch.float64, None]))
def test_any_shape(batch, n, inverse, dtype, out):
    x = torch.randn(*batch, 3 * n + 3, n, dtype=torch.float64)
    h = (x.mT @ x).to(dtype)
    u, damp, info = hessian_factor(h, factor_dtype=out, inverse=inverse)
    want, want_damp, want_info = reference.hessian_factor(h, factor_dtype=torch.float64, inverse=inverse)
    assert u.dtype == (out or dtype) and u.shape == h.shape and damp.shape == info.shape == tuple(batch)
    assert torch.equal(info, want_info) and torch.equal(damp, want_damp)
    torch.testing.assert_close(u.double(), want, rtol=1e-3, atol=1e-4)


def test_bad_input():
    h = torch.eye(3)
    with pytest.raises(TypeError, match="H must be a torch.Tensor, got list"):
        hessian_factor([1.0])
    with pytest.raises(TypeError, match="H must be float32 or float64, got torch.float16"):
        hessian_factor(h.half())
    with pytest.raises(TypeError, match="factor_dtype must be float32 or float64, got torch.bfloat16"):
        hessian_factor(h, factor_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"H must have shape \(..., N, N\), got \(3, 2\)"):
        hessian_factor(h[:, :2])
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="damp_percent must be 0 to 1"):
            hessian_factor(h, damp_percent=bad)
        with pytest.raises(ValueError, match="damp_auto_increment must be 0 to 1"):
            hessian_factor(h, damp_auto_increment=bad)
