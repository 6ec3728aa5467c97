"""newton_schulz with products of bf16 (one part, and the sum of two), on the CPU at every level that has them."""


import pytest
import torch

from gradops.linalg import newton_schulz
from gradops.linalg.reference import newton_schulz as reference_newton_schulz

BF16X3, BF16 = 1, 2  # NewtonSchulzProducts
SIMPLE = [3.4445, -4.7750, 2.0315] * 5
QUINTIC = [4.0848, -6.8946, 2.9270, 3.9505, -6.3029, 2.6377, 3.7418, -5.5913, 2.3037, 2.8769, -3.1427, 1.2046,
           2.8366, -3.0525, 1.2012]
SHAPES = [(1, 1), (1, 5), (5, 1), (2, 3), (33, 47), (47, 33), (100, 65), (200, 40), (128, 1024), (1024, 128),
          (300, 300), (32, 32), (64, 64)]  # fmt: skip
BIG = (513, 550)  # beyond the second-level cache: panels in groups
PAIRS = [(torch.bfloat16, BF16), (torch.float32, BF16), (torch.float32, BF16X3), (torch.bfloat16, BF16X3)]
PAIR_IDS = ["bf16", "f32-bf16", "f32-bf16x3", "bf16-bf16x3"]
LEVELS = ["v4_bf16", "amx", "amx_twin"]


def run(x, coefficients=QUINTIC, normalize=True, products=BF16):
    return torch.ops.gradops.newton_schulz(x, coefficients, normalize, products)


def gauss(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(x, coefficients=QUINTIC, normalize=True):
    """In float64."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.double().mT if tall else x.double()
    if normalize:
        y = y / y.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in torch.tensor(coefficients, dtype=torch.float64).reshape(-1, 3).tolist():
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


def relative(y, want):
    return ((y.double() - want).norm() / want.norm()).item()


def levels_here():
    try:
        run(torch.ones(1, 1))
    except RuntimeError as error:
        if "no bf16 products" in str(error):
            return False
        raise
    return True


here = pytest.mark.skipif(not levels_here(), reason="this machine has no bf16 products")


@pytest.mark.parametrize("level", LEVELS)
def test_level(level, run_at_level):
    run_at_level(level, "matches or item_equals or thread or stay", __file__)


@here
@pytest.mark.parametrize("dtype, products", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("shape", [*SHAPES, BIG], ids=str)
def test_matches_float64(shape, dtype, products):
    x = gauss(2, *shape, dtype=dtype) if shape != BIG else gauss(*shape, dtype=dtype)
    before = x.clone()
    for coefficients in (QUINTIC, SIMPLE) if shape != BIG else (QUINTIC,):
        y, want = run(x, coefficients, products=products), reference(x, coefficients)
        assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, before)
        if products == BF16X3 and dtype == torch.float32:
            assert relative(y, want) <= 1e-4
        elif products == BF16X3:  # as accurate, then rounded
            assert relative(y, want) <= 2**-8 + 1e-4
        else:
            assert (y.double() - want).abs().max() <= 0.02


def conditioned(batch, rows, cols, kappa):
    generator = torch.Generator().manual_seed(rows + cols)
    rank = min(rows, cols)
    u = torch.linalg.qr(torch.randn(batch, rows, rank, dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(batch, cols, rank, dtype=torch.float64, generator=generator))[0]
    return u * kappa ** -torch.linspace(0, 1, rank, dtype=torch.float64) @ v.mT


@here
@pytest.mark.parametrize("coefficients", ["polar_express", "simple"])
@pytest.mark.parametrize("kappa", [1.0, 10.0, 1e6])
@pytest.mark.parametrize("shape", [(32, 32), (96, 40)], ids=str)
@pytest.mark.usefixtures("one_thread")
def test_matches_float64_at_condition_number(shape, kappa, coefficients):
    x = conditioned(8, *shape, kappa).bfloat16()
    want = reference_newton_schulz(x.double(), coefficients=coefficients)
    error = (newton_schulz(x, coefficients=coefficients).double() - want).abs().max()
    assert error <= (0.02 if kappa <= 10 else 0.025)


@pytest.mark.parametrize("shape", [(50, 8, 8), (20, 16, 40), (5, 100, 24)], ids=str)
def test_narrow_matrices_are_only_rounded(shape):
    x = gauss(*shape, dtype=torch.bfloat16)
    for y in (newton_schulz(x), newton_schulz(x.float(), precision="medium").bfloat16()):
        error = (y.double() - reference_newton_schulz(x.double())).abs().max()
        assert error <= 2**-8  # of numbers below 2


@here
def test_no_steps_is_the_normalized_input():
    x = gauss(2, 40, 70)
    assert relative(run(x, [], products=BF16X3), reference(x, [])) <= 1e-5
    assert relative(run(x, [], normalize=False, products=BF16X3), x.double()) <= 1e-5


@here
@pytest.mark.parametrize("products", [BF16X3, BF16])
def test_not_normalized(products):
    x = gauss(2, 40, 70) / 60
    want = reference(x, normalize=False)
    assert relative(run(x, normalize=False, products=products), want) <= (1e-4 if products == BF16X3 else 2e-2)


@here
@pytest.mark.parametrize("dtype, products", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("shape", [(33, 47), (47, 33), (64, 64), (300, 40)], ids=str)
def test_batch_item_equals_single(shape, dtype, products):
    x = gauss(5, *shape, dtype=dtype)
    y = run(x, products=products)
    for i in range(len(x)):
        assert torch.equal(y[i], run(x[i], products=products))


@here
@pytest.mark.parametrize("dtype, products", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("shape", [(300, 290), (128, 520), (520, 128), BIG], ids=str)
def test_thread_count_does_not_matter(shape, dtype, products):
    x, threads = gauss(*shape, dtype=dtype), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(x, products=products))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], y) for y in results[1:])


@here
@pytest.mark.parametrize("dtype, products", PAIRS, ids=PAIR_IDS)
def test_scale(dtype, products):
    x = gauss(2, 64, 96, dtype=dtype)
    want = run(x, products=products)
    for power in (100, -100):  # powers of two change no bit
        assert torch.equal(run(x * 2.0**power, products=products), want)
    for scale in (1e30, 1e-30):
        scaled = x * scale
        assert (run(scaled, products=products).double() - reference(scaled)).abs().max() <= 0.02


@here
@pytest.mark.parametrize("dtype, products", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("shape", [(40, 40), (33, 70), (70, 33), (160, 150)], ids=str)
def test_zeros_nan_and_infinity_stay_in_their_matrix(shape, dtype, products):
    x = gauss(5, *shape, dtype=dtype)
    clean = run(x, products=products)
    x[1] = 0
    x[2, -1, 3] = torch.nan
    x[3, 0, -1] = -torch.inf
    for normalize in (True, False):
        y = run(x, products=products, normalize=normalize)
        assert (y[1] == 0).all() and y[2].isnan().all() and y[3].isnan().all()
        if normalize:
            assert torch.equal(y[[0, 4]], clean[[0, 4]])


@here
def test_strided_and_unaligned():
    memory = gauss(1 + 2 * 33 * 36)
    for view in (memory[1:].view(2, 33, 36), memory[1:].view(2, 36, 33).mT, memory[:-1].view(2, 33, 36)[:, :, ::2],
                 memory[:36].expand(33, 36)):  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(run(view.to(dtype)), run(view.clone().to(dtype).contiguous()))
    assert torch.equal(run(memory[1:].view(2, 33, 36)[0]), run(memory[1:].view(2, 33, 36))[0])


@here
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty(shape):
    assert run(torch.zeros(shape)).shape == shape


@here
def test_leading_dimensions():
    x = gauss(2, 3, 20, 30)
    assert torch.equal(run(x), run(x.reshape(6, 20, 30)).reshape(x.shape))


@here
def test_other_elements_are_refused():
    with pytest.raises(RuntimeError, match="bf16 or f32"):
        run(gauss(4, 4).double())
