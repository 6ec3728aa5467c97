import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp

from gradops.curvature import cross_entropy, reference

from .second_order import check_second_order

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative, of a vector: exponentials in float32, and one rounding to the dtype
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def numbers(shape, dtype=torch.float64, seed=0, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def targets(shape, classes, seed=1):
    t = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2, -100, t)


def error(ours, want):
    return (ours.double() - want).norm() / want.norm().clamp(min=1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 70)])
def test_raw_ops(backend, dtype, shape, smoothing):
    device, ops = backend
    z, u, t = numbers(shape, dtype, scale=3), numbers(shape, dtype, 1), targets(shape[:-1], shape[-1])
    t.view(-1)[0] = 2
    g, g_dot = numbers(shape[:-1], seed=2), numbers(shape[:-1], seed=3)
    z, u, t, g, g_dot = (x.to(device) for x in (z, u, t, g, g_dot))
    copies = [x.clone() for x in (z, u, t, g, g_dot)]
    rule = (-100, smoothing)

    def losses(z):
        return reference.cross_entropy(z.movedim(-1, 1), t, reduction="none", label_smoothing=smoothing)

    def gradient(z, g):
        return torch.func.vjp(losses, z)[1](g)[0]

    def near(ours, want, rounded=True):
        assert error(ours, want) <= (TOLERANCE[dtype] if rounded else min(TOLERANCE[dtype], 5e-7))

    loss, lse = ops.cross_entropy(z, t, *rule)
    near(loss, losses(z.double()), rounded=False)
    near(ops.cross_entropy_backward(z, t, lse, g, *rule), gradient(z.double(), g))
    loss_dot, lse_dot = ops.cross_entropy_jvp(z, t, u, lse, *rule)
    near(loss_dot, jvp(losses, (z.double(),), (u.double(),))[1], rounded=False)
    for along_g in (g_dot, None):
        ours = ops.cross_entropy_backward_jvp(z, t, u, lse, lse_dot, g, along_g, *rule)
        near(ours, jvp(gradient, (z.double(), g), (u.double(), 0 * g if along_g is None else along_g))[1])
    assert all(torch.equal(x, y) for x, y in zip((z, u, t, g, g_dot), copies, strict=True))
    over_z, over_u = z.clone(), u.clone()
    ops.cross_entropy_backward_(over_z, t, lse, g, *rule)
    assert torch.equal(over_z, ops.cross_entropy_backward(z, t, lse, g, *rule))
    ops.cross_entropy_backward_jvp_(z, t, over_u, lse, lse_dot, g, None, *rule)
    assert torch.equal(over_u, ours)


@given(dtype=st.sampled_from(DTYPES), rows=st.integers(0, 5), classes=st.integers(1, 5000),
       smoothing=st.sampled_from([0.0, 0.3, 1.0]), reduction=st.sampled_from(["mean", "sum", "none"]))
@settings(deadline=None, max_examples=30)
def test_matches_torch_in_float64(dtype, rows, classes, smoothing, reduction):
    z, t = numbers((rows, classes), dtype, scale=4).requires_grad_(), targets((rows,), classes)
    exact = z.detach().double().requires_grad_()
    ours = cross_entropy(z, t, reduction=reduction, label_smoothing=smoothing)
    want = F.cross_entropy(exact, t, reduction=reduction, label_smoothing=smoothing)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), want, rtol=TOLERANCE[dtype], atol=1e-6, equal_nan=True)
    if rows == 0 or bool((t == -100).all()):
        return
    weights = torch.arange(1, 1 + ours.numel()).view(ours.shape)  # numbers of every dtype
    ours, = torch.autograd.grad((ours * weights).sum(), z)
    want, = torch.autograd.grad((want * weights).sum(), exact)
    # float16 has no numbers below 6e-8; a single class has a gradient of 0, the sum of terms of the order of 1
    lost = 1e-7 * classes**0.5 if dtype == torch.float16 else 1e-15
    assert (ours.double() - want).norm() <= 2 * TOLERANCE[dtype] * want.norm() + lost


def closed_over(f, target, **options):
    return lambda z: f(z, target, **options)


@pytest.mark.parametrize("shape, reduction", [((3, 4), "none"), ((2, 3, 2), "mean"), ((4,), "sum")])
def test_second_order(shape, reduction):
    z = numbers(shape)
    t = torch.tensor([1, -100, 3])[:shape[0]] if len(shape) == 2 else torch.tensor([[0, 2], [1, -100]])
    t = torch.tensor(2) if len(shape) == 1 else t
    options = {"reduction": reduction, "label_smoothing": 0.2}
    check_second_order(closed_over(cross_entropy, t, **options), closed_over(F.cross_entropy, t, **options), [z])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_and_large_logits(backend, dtype):
    """-inf has p = 0; 1e4 loses no digit; a row of nothing, or with a NaN, is NaN alone; an ignored one is not read."""
    device, ops = backend
    z = numbers((6, 9), dtype)
    z[0, 3:] = -torch.inf
    z[1] += 1e4 if dtype != torch.float16 else 1e3
    z[2] = -torch.inf
    z[3, 1] = torch.nan
    z[4] = torch.nan
    t = torch.tensor([0, 1, 2, 3, -100, 5])
    z, t, u, g = z.to(device), t.to(device), numbers((6, 9), dtype, 1).to(device), torch.ones(6).double().to(device)
    exact = z.double()
    loss, lse = ops.cross_entropy(z, t, -100, 0.0)
    want = F.cross_entropy(exact, t, reduction="none")
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    lse_dot = ops.cross_entropy_jvp(z, t, u, lse, -100, 0.0)[1]
    dz = ops.cross_entropy_backward(z, t, lse, g, -100, 0.0)
    dz_dot = ops.cross_entropy_backward_jvp(z, t, u, lse, lse_dot, g, None, -100, 0.0)
    h = ops.softmax_ce_hvp(z, u, (t != -100).double())
    p = exact.softmax(-1)
    target = F.one_hot(t.clamp(min=0), 9)
    u = u.double()
    for ours, want in ((dz, p - target), (dz_dot, p * (u - (p * u).sum(-1, keepdim=True))),
                       (h, p * (u - (p * u).sum(-1, keepdim=True)))):
        want[4] = 0
        torch.testing.assert_close(ours.double(), want, rtol=2 * TOLERANCE[dtype], atol=1e-6, equal_nan=True)
        assert ours[2:4].isnan().all() and (ours[0, 3:] == 0).all()
    smooth = ops.cross_entropy(z, t, -100, 0.1)[0]
    assert smooth[0] == torch.inf and smooth[4] == 0 and smooth[2:4].isnan().all()
    torch.testing.assert_close(smooth[1], F.cross_entropy(exact[1], t[1], label_smoothing=0.1), rtol=1e-6, atol=1e-6)


def test_a_row_masked_for_longer_than_a_block():
    z = torch.full((2, 5000), -torch.inf)
    z[:, 4500:] = numbers((2, 500), torch.float32)
    z[1, 7] = torch.nan
    loss = cross_entropy(z, torch.tensor([4600, 4600]), reduction="none")
    torch.testing.assert_close(loss[0], F.cross_entropy(z[0], torch.tensor(4600)))
    assert loss[1].isnan()


def test_all_rows_ignored():
    z, t = numbers((3, 4)).requires_grad_(), torch.full((3,), -100)
    loss = cross_entropy(z, t)
    assert loss.isnan()
    loss.backward()
    assert (z.grad == 0).all()
    assert cross_entropy(z, t, reduction="sum") == 0


def test_a_mean_in_16_bits_is_made_in_float64():
    """70000 rows: their number is no float16, and a running sum of bfloat16 would stop growing."""
    for dtype in (torch.bfloat16, torch.float16):
        z = torch.zeros(70000, 2, dtype=dtype)
        loss = cross_entropy(z, torch.zeros(70000, dtype=torch.int64))
        torch.testing.assert_close(loss, torch.tensor(2.0).log().to(dtype))


def test_batches_rows_and_strides_agree():
    z, t = numbers((2, 37, 5, 3), torch.float32), targets((2, 5, 3), 37)
    whole = cross_entropy(z, t, reduction="none")
    for i in range(2):
        for j in range(5):
            assert torch.equal(whole[i, j], cross_entropy(z[i, :, j].T, t[i, j], reduction="none"))
    assert torch.equal(whole[0, 0, 0], cross_entropy(z[0, :, 0, 0], t[0, 0, 0], reduction="none"))
    assert torch.equal(whole, cross_entropy(z, t.int(), reduction="none"))


def test_compile():
    t = torch.tensor([1, -100, 3])

    def product(z, u):
        return jvp(grad(lambda z: cross_entropy(z, t, label_smoothing=0.1)), (z,), (u,))[1]

    z, u = numbers((3, 4)), numbers((3, 4), seed=1)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")(z, u)
    torch.testing.assert_close(compiled, product(z, u))
    assert compiled.abs().max() > 0


@pytest.mark.parametrize("change, kind, message", [
    ({"input": [1.0]}, TypeError, "input must be a torch.Tensor, got list"),
    ({"input": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "input must be float64"),
    ({"input": torch.zeros(3, 0)}, ValueError, "input must have at least 1 class"),
    ({"input": torch.tensor(1.0)}, ValueError, "input must have at least 1 class"),
    ({"target": torch.rand(3, 4)}, TypeError, "target must hold class indices.*torch.nn.functional.cross_entropy"),
    ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target must have shape \(3,\)"),
    ({"target": torch.tensor([0, 4, 1])}, ValueError, r"target must be in \[0, 4\) or ignore_index, -100, got 4"),
    ({"target": torch.tensor([0, -1, 1])}, ValueError, r"target must be in \[0, 4\).*got -1"),
    ({"weight": torch.ones(4)}, TypeError, "weight must be None.*torch.nn.functional.cross_entropy"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer"),
    ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number"),
])
def test_what_is_wrong_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        cross_entropy(**{"input": torch.zeros(3, 4), "target": torch.tensor([0, 1, 2])} | change)


def test_a_bad_target_on_cuda_is_nan(cuda_backend):
    device, ops = cuda_backend
    z, t = numbers((3, 4)).to(device), torch.tensor([1, 7, -3]).to(device)
    loss, lse = ops.cross_entropy(z, t, -100, 0.0)
    assert loss[0].isfinite() and loss[1:].isnan().all()
    dz = ops.cross_entropy_backward(z, t, lse, torch.ones_like(lse), -100, 0.0)
    assert dz[0].isfinite().all() and dz[1:].isnan().all()
