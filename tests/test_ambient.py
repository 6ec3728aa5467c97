"""What torch is set to around a call changes nothing in its results."""
import contextlib

import pytest
import torch

from gradops import linalg, ot, rl
from gradops.curvature import slq_density
from gradops.optim import HARPG, Muon

from .test_op import CALLS


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    """New memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "deterministic": deterministic,
}


def run(name, x, around):
    """The result, and the gradient of its sum, of a call in these surroundings."""
    c = CALLS[name]
    differentiates = c.derivatives > 0 and around not in (torch.inference_mode, torch.no_grad)
    x = x.clone().requires_grad_(differentiates)
    with around():
        y = c.public(x)
    if not differentiates:
        return [y]
    y.double().nansum().backward()
    return [y.detach(), x.grad]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", [name for name, c in CALLS.items() if c.public])
def test_surroundings_change_nothing(name, around):
    c = CALLS[name]
    for dtype in (torch.float32, torch.bfloat16) if c.floating else (None,):
        x = c.example().to(dtype)
        try:
            plain = run(name, x, torch.no_grad if around == "inference" else contextlib.nullcontext)
        except TypeError:  # not an op for this dtype
            assert dtype == torch.bfloat16
            continue
        for got, want in zip(run(name, x, AROUND[around]), plain, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_matrices_beyond_the_smallest_under_autocast():
    """They take other routes."""
    x = torch.randn(3, 160, 60, generator=torch.Generator().manual_seed(0))
    a = x.mT @ x
    calls = [lambda: linalg.polar(x), lambda: [linalg.inv_sqrt(a)], lambda: [linalg.one_sided_polar(x)],
             lambda: [linalg.newton_schulz(x, form="gram")], lambda: linalg.spectral_solve(a, x[:, 0])]
    for call in calls:
        plain = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, call(), plain))


def test_derivatives_within_autocast():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient():
        return torch.autograd.grad(linalg.gram(x).square().sum() + linalg.polar(x, compute_h=True)[1].sum(), x)[0]

    plain = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(), plain)


def test_default_device():
    """Tensors of our own are where the arguments are."""
    x = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    costs, weights = x.abs(), torch.full((60,), 1 / 60)
    p = torch.nn.Parameter(x.clone())
    p.grad = x.clone()
    with torch.device("meta"):
        assert linalg.polar(x)[0].isfinite().all()
        assert linalg.inv_sqrt(x @ x.mT + x.new_ones(60).diag()).isfinite().all()
        assert rl.group_index(["b", "a", "b"])[0].tolist() == [0, 1, 0]
        plan = ot.solve(costs, weights, weights, reg=0.1).plan
        assert torch.equal(plan.to_torch_sparse().to_dense(), plan.to_dense())
        density = slq_density(lambda v: x @ v, 5, like=x[0], n_vectors=2, generator=torch.Generator())
        assert density.density.isfinite().all()
        Muon([p]).step()
        optimizer = HARPG([p], lr=0.1, generator=torch.Generator())
        with optimizer.interpolate():
            pass
        with pytest.raises(ValueError, match="NaN"):
            ot.entropic(torch.where(costs == costs[3, 3], torch.nan, costs), weights, weights, reg=0.1,
                        n_len=x.new_full((), 60).long(), m_len=x.new_full((), 60).long())
    assert p.isfinite().all()
