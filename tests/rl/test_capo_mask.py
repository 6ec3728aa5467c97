import pytest
import torch

from gradops.rl import capo_mask, reference


@pytest.mark.parametrize("preset", ["capo", "dr_capo", "reincapo"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_reference(preset, symmetric):
    g = torch.Generator().manual_seed(0)
    grad_dot, hess, fisher = (10.0 ** (4 * torch.randn(400, generator=g, dtype=torch.float64) + p) for p in (2, 6, 6))
    grad_dot[::2] *= -1
    options = {"preset": preset, "symmetric": symmetric}
    got = capo_mask(grad_dot, hess, fisher, **options)
    assert got.dtype == torch.bool and torch.equal(got, reference.capo_mask(grad_dot, hess, fisher, **options))
    assert 0 < got.sum() < 400


def test_thresholds_and_nan():
    one, nan = torch.ones(()), torch.tensor(torch.nan)
    assert capo_mask(one, 2 * one, 3 * one, lr=1.0, tau_h=2.01, tau_f=1.51)
    assert not capo_mask(one, 2 * one, 3 * one, lr=1.0, tau_h=2.0, tau_f=1.51)
    assert not capo_mask(one, 2 * one, 3 * one, lr=1.0, tau_h=2.01, tau_f=1.5)
    assert not any(capo_mask(*x) for x in ((nan, one, one), (one, nan, one), (one, one, nan)))


def test_bad_input():
    x = torch.ones(3)
    with pytest.raises(TypeError, match="hess must be a torch.Tensor, got float"):
        capo_mask(x, 1.0, x)
    with pytest.raises(ValueError, match="fisher must have the shape of grad_dot"):
        capo_mask(x, x, x[:2])
    with pytest.raises(ValueError, match="preset must be one of"):
        capo_mask(x, x, x, preset="grpo")
    for name in ("lr", "tau_h", "tau_f"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            capo_mask(x, x, x, **{name: 0})
