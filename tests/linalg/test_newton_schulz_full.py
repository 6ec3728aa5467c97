"""newton_schulz on the CPU with full-precision products, at every x86-64 level this machine runs."""

import pytest
import torch

import gradops  # noqa: F401  (loads the libraries)

QUINTIC = [4.0848, -6.8946, 2.9270, 3.9505, -6.3029, 2.6377, 3.7418, -5.5913, 2.3037, 2.8769, -3.1427, 1.2046,
           2.8366, -3.0525, 1.2012]
CUBIC = [1.5, -0.5, 0.0] * 3
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 5), (5, 1), (3, 4), (16, 16), (17, 18), (33, 47), (47, 33), (64, 64), (100, 65), (200, 40),
          (128, 1024), (300, 300), (2, 3, 20, 70)]
# Relative error of the result. The 16-bit types: one rounding, so at most their unit roundoff.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


pytestmark = pytest.mark.usefixtures("one_thread")


def kernel(x, coefficients=QUINTIC, normalize=True, restart=0):
    return torch.ops.gradops.newton_schulz(x, coefficients, normalize, 0, restart)


def reference(x, coefficients=QUINTIC, normalize=True):
    tall = x.shape[-2] > x.shape[-1]
    y = x.double().mT if tall else x.double()
    if normalize:
        y = y / y.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in torch.tensor(coefficients, dtype=torch.float64).reshape(-1, 3).tolist():
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


def gaussian(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(y, want):
    return ((y.double() - want).norm() / want.norm()).item() <= TOLERANCE[y.dtype]


@pytest.mark.parametrize("level", ["v2", "v3", "v4"])
def test_every_level(level, run_at_level):
    run_at_level(level, "cpu", __file__)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_matches_reference(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    before = x.clone()
    y = kernel(x)
    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, before)
    assert close(y, reference(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 70), (70, 20), (65, 65)])
def test_cpu_without_normalization_and_without_square_term(shape, dtype):
    x = (gaussian(*shape, dtype=torch.float64) / 10).to(dtype)
    assert close(kernel(x, QUINTIC[:3], False), reference(x, QUINTIC[:3], False))
    assert close(kernel(x, CUBIC), reference(x, CUBIC))
    assert close(kernel(x, []), reference(x, []))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 40), (65, 200), (200, 65), (3, 130, 300)])
@pytest.mark.parametrize("restart", [1, 2, 3])
def test_cpu_gram_form(shape, dtype, restart):
    x = gaussian(*shape, dtype=dtype)
    y = kernel(x, QUINTIC, True, restart)
    want = reference(x)
    slack = 10 if dtype in (torch.float32, torch.float64) and restart > 1 else 1  # small singular values lose digits
    assert ((y.double() - want).norm() / want.norm()).item() <= slack * TOLERANCE[dtype]
    if restart == 1:
        assert torch.equal(y, kernel(x))


def test_cpu_gram_form_without_square_term_nan_and_threads():
    x = gaussian(3, 130, 300)
    assert close(kernel(x, CUBIC, True, 3), reference(x, CUBIC))
    want = kernel(x, QUINTIC, True, 3)
    x[1, 2, 3] = torch.nan
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = kernel(x, QUINTIC, True, 3)
        assert y[1].isnan().all() and torch.equal(y[[0, 2]], want[[0, 2]])
        assert torch.equal(kernel(x[2], QUINTIC, True, 3), want[2])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 0)])
def test_cpu_empty(shape):
    assert kernel(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 32, 32), (3, 130, 200), (5, 200, 130), (3, 33, 7)])
def test_cpu_batch_item_equals_single_for_any_number_of_threads(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    want = kernel(x, QUINTIC[:6])
    assert torch.equal(torch.stack([kernel(item, QUINTIC[:6]) for item in x]), want)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(kernel(x, QUINTIC[:6]), want)


@pytest.mark.parametrize("dtype,scales", [(torch.float32, (1e30, 1e-30)), (torch.bfloat16, (1e30, 1e-30)),
                                          (torch.float64, (1e30, 1e-30, 1e200, 1e-200, 1e300, 1e-305)),
                                          (torch.float16, (1e3, 1e-3))])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_cpu_scale_does_not_matter(shape, dtype, scales):
    x = gaussian(*shape, dtype=dtype)
    for scale in scales:
        scaled = (x.double() * scale).to(dtype)
        assert close(kernel(scaled), reference(scaled.double() / scale))
    exponents = {torch.float16: 5, torch.float64: 1000}.get(dtype, 120)
    for power in (2.0**exponents, 2.0**-exponents):  # exact in the dtype, up to subnormals
        assert close(kernel(x * power), kernel(x).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_subnormal_input(dtype):
    x = torch.eye(20, 30, dtype=dtype) * torch.finfo(dtype).smallest_normal / 8
    assert close(kernel(x), reference(torch.eye(20, 30)))


def test_cpu_results_round_to_subnormal_half():
    x = torch.diag(torch.tensor([1.0, 3e-7, 1e-5, 4e-8, 2e-8])).half()
    y = kernel(x, [1.0, 0.0, 0.0])
    assert torch.equal(y, (x.double() / x.double().norm()).half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_zeros(dtype):
    assert torch.equal(kernel(torch.zeros(2, 33, 20, dtype=dtype)), torch.zeros(2, 33, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40, 70), (3, 70, 40), (3, 150, 150)])
@pytest.mark.parametrize("normalize", [True, False])
def test_cpu_nan_and_inf_stay_in_their_matrix(shape, dtype, normalize):
    x = gaussian(*shape, dtype=dtype) / 30
    want = kernel(x, QUINTIC, normalize)
    for bad, place in ((torch.nan, (0, 0)), (torch.inf, (-1, -1)), (-torch.inf, (17, 9))):
        broken = x.clone()
        broken[(1, *place)] = bad
        y = kernel(broken, QUINTIC, normalize)
        assert y[1].isnan().all()
        assert torch.equal(y[0], want[0]) and torch.equal(y[2:], want[2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_non_contiguous(dtype):
    x = gaussian(2, 70, 99, dtype=dtype)
    for view in (x.mT, x[:, ::2, 1::3], x[:, :, 1:], x[:1].expand(3, -1, -1)):
        assert torch.equal(kernel(view), kernel(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_every_16_bit_number_survives(dtype):
    """No step, no normalization: widened, transposed, rounded back."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    for shape in ((1, -1), (-1, 1)):
        assert torch.equal(kernel(x.reshape(shape), [], False).flatten(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_rounds_to_nearest_even(dtype):
    """With b = c = 0 a step is a product with a, rounded once to the dtype."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x.float().abs() < 1e9) & ((x.float().abs() > 1e-30) | (x == 0))].reshape(2, -1)
    for a in (1.0 + 2.0**-9, 0.75, 3.0, 1.0 / 3.0):
        want = (x.float() * torch.tensor(a, dtype=torch.float32)).to(dtype)
        assert torch.equal(kernel(x, [a, 0.0, 0.0], False), want)
