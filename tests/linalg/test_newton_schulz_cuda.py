"""The CUDA kernels of newton_schulz, called as raw ops: on a GPU, and on the CPU through the emulator ("emu")."""
import pytest
import torch

QUINTIC = [4.0848, -6.8946, 2.9270, 3.9505, -6.3029, 2.6377, 3.7418, -5.5913, 2.3037, 2.8769, -3.1427, 1.2046,
           2.8366, -3.0525, 1.2012]
FULL, BF16X3, BF16 = 0, 1, 2  # how float32 is multiplied
slow = pytest.mark.slow


def two_parts(x):
    high = x.bfloat16().float()
    return high, (x - high).bfloat16().float()


ROUND = {  # what the iterates are stored in
    (torch.bfloat16, FULL): lambda x: x.bfloat16().float(),
    (torch.float16, FULL): lambda x: x.half().float(),
    (torch.float32, FULL): lambda x: x,
    (torch.float32, BF16X3): lambda x: sum(two_parts(x)),
    (torch.float32, BF16): lambda x: x.bfloat16().float(),
}
KINDS = list(ROUND)
NAMES = ["bf16", "f16", "f32", "f32x3", "f32low"]
# Largest and mean difference from the reference: float32 sums in another order, which may flip a rounding.
TOLERANCE = {"bf16": (0.01, 5e-4), "f16": (2e-3, 1e-4), "f32": (4e-6, 5e-7), "f32x3": (4e-5, 2e-6),
             "f32low": (0.01, 5e-4)}
kinds = pytest.mark.parametrize(("dtype", "products"), KINDS, ids=NAMES)


def reference(x, coefficients, products=FULL, normalize=True):
    """The kernel's rounding points in plain torch: products and sums in float32, stored values rounded."""
    dtype, tall = x.dtype, x.shape[-2] > x.shape[-1]
    low = ROUND[dtype, products]

    def times(p, q):
        if products != BF16X3:
            return p @ q
        (p0, p1), (q0, q1) = two_parts(p), two_parts(q)
        return p0 @ q0 + (p0 @ q1 + p1 @ q0)

    y = x.cpu().double().mT if tall else x.cpu().double()
    if normalize:
        norm = y.norm(dim=(-2, -1), keepdim=True)
        y = y / norm.where(norm > 0, 1)
    y = low(y.float())
    for a, b, c in torch.tensor(coefficients).reshape(-1, 3).tolist():
        gram = low(times(y, y.mT))
        y = low(a * y + times(low(b * gram + c * times(gram, gram)), y))
    return (y.mT if tall else y).to(dtype)


def random(shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.fixture
def op(cuda_backend):
    device, ops = cuda_backend
    return device, lambda x, coefficients=QUINTIC, normalize=True, products=FULL: ops.newton_schulz(
        x, list(coefficients), normalize, products)


def check(op, shape, dtype, products, coefficients=QUINTIC, normalize=True):
    device, newton_schulz = op
    x = random(shape, dtype, device)
    if not normalize:
        x /= x.float().norm(dim=(-2, -1), keepdim=True).to(dtype)
    before = x.clone()
    y = newton_schulz(x, coefficients, normalize, products)
    want = reference(x, coefficients, products, normalize)
    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, before)
    error = (y.cpu().float() - want.float()).abs()
    largest, mean = TOLERANCE[NAMES[KINDS.index((dtype, products))]]
    assert error.max() <= largest and error.mean() <= mean


# Resident in shared memory: wide, tall, tails of every kind, each number of 32 x 32 tiles.
@kinds
@pytest.mark.parametrize("shape", [(1, 33, 70), (2, 70, 33), pytest.param((2, 64, 64), marks=slow),
                                   pytest.param((1, 100, 97), marks=slow), pytest.param((1, 128, 130), marks=slow)])
def test_resident(op, shape, dtype, products):
    check(op, shape, dtype, products)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (3, 2, 2, 3), (5, 32, 32)])
def test_small_and_leading_dimensions(op, shape):
    check(op, shape, torch.float32, FULL)


# Streamed through shared memory, because the smaller side is above 128, or the other one too long.
@kinds
@pytest.mark.parametrize("shape", [(1, 130, 140), pytest.param((2, 200, 161), marks=slow),
                                   pytest.param((1, 256, 260), marks=slow), pytest.param((3, 40, 1900), marks=slow),
                                   pytest.param((1, 1000, 100), marks=slow)])
def test_streamed(op, shape, dtype, products):
    check(op, shape, dtype, products, QUINTIC[:3])


@slow
@kinds
def test_streamed_all_steps(op, dtype, products):
    check(op, (1, 144, 150), dtype, products)


@kinds
def test_less_shared_memory(op, dtype, products, monkeypatch):  # 99 KB, as on sm_120
    if op[0] != "cpu":
        pytest.skip("emulator only")
    monkeypatch.setenv("GRADOPS_EMU_SHARED", str(99 * 1024))
    check(op, (1, 120, 260), dtype, products, QUINTIC[:3])  # streamed
    check(op, (1, 40, 50), dtype, products, QUINTIC[:3])  # resident


@slow
@kinds
def test_less_shared_memory_largest(op, dtype, products, monkeypatch):
    if op[0] != "cpu":
        pytest.skip("emulator only")
    monkeypatch.setenv("GRADOPS_EMU_SHARED", str(99 * 1024))
    check(op, (1, 256, 256), dtype, products, QUINTIC[:3])


@kinds
def test_without_normalization(op, dtype, products):
    check(op, (1, 20, 40), dtype, products, normalize=False)


@pytest.mark.parametrize("shape", [(2, 20, 30), (140, 129)])
def test_no_steps_only_normalizes(op, shape):
    check(op, shape, torch.float32, FULL, [])


@pytest.mark.parametrize("products", [FULL, BF16X3])
def test_accuracy_against_float64(op, products):
    device, newton_schulz = op
    x = random((1, 64, 96), device=device)
    want = x.cpu().double() / x.cpu().double().norm()
    for a, b, c in torch.tensor(QUINTIC, dtype=torch.float64).reshape(-1, 3).tolist():
        gram = want @ want.mT
        want = a * want + (b * gram + c * gram @ gram) @ want
    error = (newton_schulz(x, products=products).cpu() - want).norm() / want.norm()
    assert error <= (1e-6 if products == FULL else 5e-5)


STREAMED = pytest.param((129, 136), marks=slow)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), STREAMED])
def test_scale_zero_and_not_finite(op, shape):
    device, newton_schulz = op
    x = random((4, *shape), device=device)
    want = newton_schulz(x, QUINTIC[:3])
    for scale in (2. ** 100, 2. ** -100):
        assert torch.equal(newton_schulz(x * scale, QUINTIC[:3]), want)
    for scale in (1e30, 1e-30):
        torch.testing.assert_close(newton_schulz(x * scale, QUINTIC[:3]), want)
    x[1], x[2, 3, 4], x[3, 0, 0] = 0, torch.nan, torch.inf
    y = newton_schulz(x, QUINTIC[:3])
    assert (y[1] == 0).all() and y[2].isnan().all() and y[3].isnan().all()
    assert torch.equal(y[0], want[0])
    x[1, 0, 0] = torch.nan  # among zeros
    assert newton_schulz(x[1], QUINTIC[:3]).isnan().all()


@pytest.mark.parametrize("shape", [(24, 40), STREAMED])
def test_batch_item_equals_single(op, shape):
    device, newton_schulz = op
    x = random((3, *shape), torch.bfloat16, device)
    y = newton_schulz(x, QUINTIC[:3])
    for i in range(3):
        assert torch.equal(y[i], newton_schulz(x[i].clone(), QUINTIC[:3]))
    assert torch.equal(newton_schulz(x, QUINTIC[:3]), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_and_strided(op, dtype):
    device, newton_schulz = op
    x = random((1 + 2 * 32 * 36,), dtype, device)
    for view in (x[1:].view(2, 32, 36), x[1:].view(2, 36, 32).mT, x[:-1].view(2, 32, 36)[:, :, ::2],
                 x[:36 * 32].view(1, 32, 36).expand(2, -1, -1)):
        assert torch.equal(newton_schulz(view, QUINTIC[:3]), newton_schulz(view.clone(), QUINTIC[:3]))


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 3), (2, 3, 0)])
def test_empty(op, shape):
    device, newton_schulz = op
    assert newton_schulz(torch.empty(shape, device=device)).shape == shape


def test_what_has_no_kernel_is_refused(op):
    device, newton_schulz = op
    with pytest.raises(RuntimeError, match="smaller side is 257, the CUDA kernel takes at most 256"):
        newton_schulz(torch.zeros(257, 300, device=device))
    with pytest.raises(RuntimeError, match="no CUDA kernel for float64"):
        newton_schulz(torch.zeros(3, 3, device=device, dtype=torch.float64))


def test_many_matrices(op):
    device, newton_schulz = op
    if device == "cpu":
        pytest.skip("too slow in the emulator")
    x = random((70000, 3, 4), device=device)
    assert torch.equal(newton_schulz(x)[-1], newton_schulz(x[-1]))


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 200, 200)])
def test_cuda_graph(op, shape):
    device, newton_schulz = op
    if device == "cpu":
        pytest.skip("GPU only")
    x = random(shape, torch.bfloat16, device)
    newton_schulz(x)  # the first launch loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = newton_schulz(x)
    x.copy_(random(shape, torch.bfloat16, device).flip(0))
    graph.replay()
    assert torch.equal(y, newton_schulz(x))
