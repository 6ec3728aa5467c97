"""Defects known from other implementations, which these optimizers must not have."""

import pytest
import torch

from gradops.optim import Muon, PolarGrad

from .cases import ALL, MATRIX, give_grads, parameters


def test_bfloat16_without_nesterov_keeps_the_momentum():
    """torch.optim.Muon normalises its momentum buffer in place in this case."""
    (p,) = parameters((16, 16), dtype=torch.bfloat16)
    give_grads([p])
    for state_dtype in (None, torch.bfloat16):
        opt = Muon([p], nesterov=False, state_dtype=state_dtype)
        opt.step()
        momentum = opt.state[p]["momentum_buffer"]
        assert momentum.dtype == (state_dtype or torch.float32)
        torch.testing.assert_close(momentum.float(), 0.05 * p.grad.float(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_gradients_and_momentum_are_not_mutated(name):
    cls, settings = ALL[name]
    params = parameters((8, 8), (8, 8), (5, 9))
    opt = cls(params, **settings)
    momenta = [torch.zeros_like(p) for p in params]
    beta = settings.get("momentum", 0.95)
    for k in range(3):
        give_grads(params, k)
        grads = [p.grad for p in params]
        kept = [g.clone() for g in grads]
        opt.step()
        assert all(p.grad is g and torch.equal(g, old) for p, g, old in zip(params, grads, kept, strict=True))
        if cls is PolarGrad and (settings.get("polar_first") or beta == 0):
            continue
        for p, m, g in zip(params, momenta, kept, strict=True):
            m.lerp_(g, 1 - beta)
            if "momentum_buffer" in opt.state[p]:
                assert torch.equal(opt.state[p]["momentum_buffer"], m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", ["muon", "muon-plain", "polargrad-unscaled"])
def test_scale_of_the_gradient_does_not_matter(name, scale, dtype):
    """An overflowing norm gives zeros elsewhere."""
    cls, settings = MATRIX[name]
    plain, scaled = (parameters((16, 8), (16, 8), dtype=dtype) for _ in range(2))
    give_grads(plain)
    start = [p.detach().clone() for p in plain]
    for p, q in zip(plain, scaled, strict=True):
        q.grad = (p.grad.double() * scale).to(dtype)
    cls(plain, **settings).step()
    cls(scaled, **settings).step()
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    for p, q, p0 in zip(plain, scaled, start, strict=True):
        assert not torch.equal(p, p0)
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_zero_gradient_is_no_step(name):
    cls, settings = ALL[name]
    params = parameters((8, 8), (5, 9))
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    cls(params, **{**settings, "weight_decay": 0.0}).step()
    assert all(torch.equal(p, p0) for p, p0 in zip(params, start, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_nan_stays_in_its_parameter(name, bad):
    cls, settings = ALL[name]
    params, clean = parameters(*[(8, 6)] * 3), parameters(*[(8, 6)] * 3)
    give_grads(params), give_grads(clean)
    params[1].grad[2, 3] = bad
    cls(params, **settings).step()
    cls(clean, **settings).step()
    assert not params[1].isfinite().all()
    assert torch.equal(params[0], clean[0]) and torch.equal(params[2], clean[2])
