"""Float32 products are as precise as asked for, whichever of torch's two interfaces says how torch makes them."""
import pytest
import torch

from gradops._precision import matmul_precision, matmul_precision_for
from gradops.linalg import inv_sqrt, newton_schulz, polar
from gradops.quant import hessian_factor

BACKENDS = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}
SETTINGS = {  # how torch was set: the older interface, then the newer one; what that means on CPU
    "default": ("highest", {}, "highest"),
    "older, high": ("high", {}, "high"),
    "older, medium": ("medium", {}, "medium"),
    "newer, high": ("highest", {"cpu": "tf32"}, "high"),
    "newer, medium": ("highest", {"cpu": "bf16", "cuda": "tf32"}, "medium"),
    "newer, CUDA alone": ("highest", {"cuda": "tf32"}, "highest"),
    "newer, everything": ("highest", {"all": "tf32"}, "high"),
    "both, the newer one last": ("high", {"cpu": "ieee", "cuda": "ieee"}, "highest"),
}


def state():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "raises"
    return older, torch.backends.fp32_precision, *(b.fp32_precision for b in BACKENDS.values())


@pytest.fixture(params=SETTINGS)
def setting(request):
    older, newer, meaning = SETTINGS[request.param]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(older)
        for backend in BACKENDS.values():
            backend.fp32_precision = "none" if older == "highest" else backend.fp32_precision
        for device, value in newer.items():
            BACKENDS.get(device, torch.backends).fp32_precision = value
        yield meaning
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)
        for backend in BACKENDS.values():
            backend.fp32_precision = "none" if before == "highest" else backend.fp32_precision


@pytest.fixture
def x():
    return torch.randn(2, 48, 40, generator=torch.Generator().manual_seed(0))


def test_what_torch_is_set_to(setting, x):
    assert matmul_precision_for(x) == setting
    assert torch.equal(newton_schulz(x), newton_schulz(x, precision=setting))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_holds_within_and_nothing_is_left(setting, x, precision):
    before = state()
    with matmul_precision(precision):
        assert matmul_precision_for(x) == precision
        with matmul_precision("highest"):
            assert matmul_precision_for(x) == "highest"
        assert matmul_precision_for(x) == precision
    with pytest.raises(KeyError), matmul_precision(precision):
        raise KeyError
    assert state() == before
    torch.backends.fp32_precision = "none"  # a backend that followed it still does
    assert [b.fp32_precision for b in BACKENDS.values()] == (["none"] * 2 if before[1] == "tf32" else list(before[2:]))


def test_settings_do_not_reach_accurate_results(setting, x):
    before = state()
    u = polar(x)[0]
    assert (u.mT.double() @ u.double() - torch.eye(40)).abs().max() < 1e-5
    a = x.mT @ x / 40 + torch.eye(40)
    s = inv_sqrt(a).double()
    assert (s @ a.double() @ s - torch.eye(40)).abs().max() < 1e-5
    upper = hessian_factor(a, damp_percent=0.0, inverse=False)[0].double()
    assert (upper @ upper.mT - a.double()).abs().max() < 1e-5
    assert state() == before
