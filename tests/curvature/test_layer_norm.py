import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vjp, vmap

from gradops.curvature import layer_norm, reference, rms_norm

from .second_order import check_second_order

# Rounding of results; float32 sums over rows are float32 within a piece of 64 rows, those along a row within a lane: of
# 2100 numbers in a build without vectors.
ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
F64, F32, BF16, F16 = ERROR
SHAPES = [
    ((3, 1), F64, F64), ((2, 3, 17), F64, F64), ((2, 3, 17), F32, F32), ((2, 3, 17), F16, F16), ((2, 3, 17), BF16, F32),
    ((70, 130), F32, F32), ((70, 130), BF16, BF16), ((3, 2100), F64, F64), ((3, 2100), BF16, F32),
    ((2, 6144), F32, F32),  # sums over the rows of 48 KB: all a block has without asking, and it has other arrays
    ((2, 13000), F32, F32),  # these do not fit shared memory
]  # fmt: skip


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got, want):
    return float((got.cpu().double() - want).norm() / want.norm().clamp_min(1e-300))


def forms(center):
    """f(x, w, b) and what it should be, with or without a bias that counts."""
    if center:
        return layer_norm, reference.layer_norm
    return lambda x, w, b: rms_norm(x, w, 1e-5), lambda x, w, b: reference.rms_norm(x, w, 1e-5)


def everything(ops, x, w, b, g, changes, center):
    """The results of all passes, from the raw ops."""
    x_dot, w_dot, b_dot, g_dot = changes
    y, stats = ops.layer_norm(x, w, b, 1e-5, center)
    y_dot, stats_dot = ops.layer_norm_jvp(x, w, b, stats, x_dot, w_dot, b_dot, center)
    wanted = 1 + 2 * (w is not None) + 4 * (b is not None)
    grads = ops.layer_norm_backward(x, w, b, stats, g, center, wanted)
    changed = ops.layer_norm_backward_jvp(x, w, b, stats, g, x_dot, w_dot, stats_dot, g_dot, center, wanted)
    return [y, y_dot, *grads, *changed]


def expected(x, w, b, g, changes, center):
    """The same in float64, by torch's derivatives of the reference."""
    def f(x, w, b):
        return reference.layer_norm(x, w, b, 1e-5) if center else reference.rms_norm(x, w, 1e-5) + b

    x, w, b, g, *changes = [t.cpu().double() for t in (x, w, b, g, *changes)]
    y, y_dot = jvp(f, (x, w, b), tuple(changes[:3]))
    grads, grads_dot = jvp(lambda *a: vjp(f, *a[:3])[1](a[3]), (x, w, b, g), tuple(changes))
    return [y, y_dot, *grads, *grads_dot]


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("shape, dtype, parameters", SHAPES, ids=str)
def test_raw_ops_match_float64(backend, shape, dtype, parameters, center):
    device, ops = backend
    x, x_dot, g, g_dot = (numbers(*shape, seed=s, dtype=dtype).to(device) for s in range(4))
    w, b, w_dot, b_dot = (numbers(shape[-1], seed=s, dtype=parameters).to(device) for s in range(4, 8))
    args = x, w, b, g, (x_dot, w_dot, b_dot, g_dot)
    before = x.clone()
    for got, want in zip(everything(ops, *args, center), expected(*args, center), strict=True):
        assert got.shape == want.shape and got.is_contiguous()
        assert got.dtype == (parameters if got.dim() == 1 else dtype)
        assert error(got, want) <= ERROR[got.dtype] or (got.cpu() - want).abs().max() < 1e-12
    assert torch.equal(x, before)


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_little_shared_memory(cuda_backend, center, monkeypatch):
    """Sums over the rows that it does not hold: the same bits."""
    _, ops = cuda_backend
    if ops is torch.ops.gradops:
        pytest.skip("a GPU has what it has")
    x, x_dot, g, g_dot = (numbers(70, 130, seed=s, dtype=F32) for s in range(4))
    w, b, w_dot, b_dot = (numbers(130, seed=s, dtype=F32) for s in range(4, 8))
    args = x, w, b, g, (x_dot, w_dot, b_dot, g_dot), center
    plenty = everything(ops, *args)
    monkeypatch.setenv("GRADOPS_EMU_SHARED", "1500")
    assert all(map(torch.equal, everything(ops, *args), plenty))


@pytest.mark.parametrize("scale, offset, center", [(1, 1e4, True), (1, 0, True), (1e25, 0, True), (1e25, 0, False),
                                                   (1e-25, 0, False)])
def test_float32_keeps_its_digits(backend, scale, offset, center):
    """A mean of 10^4 deviations, in x and in its change, and squares beyond the range of float32."""
    device, ops = backend
    x, x_dot = ((numbers(9, 300, seed=s) + offset).mul(scale).float().to(device) for s in range(2))
    x[0, 0], x[1, 150], x[2] = 3e5 * scale, -9e4 * scale, x[2, 0] + 1e-3 * x[3]  # samples that mislead
    g, w = numbers(9, 300, seed=2, dtype=torch.float32).to(device), numbers(300, seed=3, dtype=torch.float32).to(device)
    y, stats = ops.layer_norm(x, w, None, 0.0, center)
    _, stats_dot = ops.layer_norm_jvp(x, w, None, stats, x_dot, None, None, center)
    got = ops.layer_norm_backward_jvp(x, w, None, stats, g, x_dot, None, stats_dot, None, center, 1)[0]

    x, x_dot, g, w = (t.cpu().double() for t in (x, x_dot, g, w))
    f = partial(reference.layer_norm if center else reference.rms_norm, weight=w, eps=0.0)
    want = jvp(lambda x: vjp(f, x)[1](g)[0], (x,), (x_dot,))[1]
    assert error(y, f(x)) < 5e-7 and error(got.double() * scale, want * scale) < 1e-6


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_what_is_not_given_is_one_or_zero(backend, center):
    device, ops = backend
    x, g, v = (numbers(2, 5, 6, seed=s).to(device) for s in range(3))
    one, zero = torch.ones(6, dtype=x.dtype, device=device), torch.zeros(6, dtype=x.dtype, device=device)
    got = everything(ops, x, None, None, g, (v, None, None, None), center)
    want = everything(ops, x, one, zero, g, (v, zero, zero, torch.zeros_like(g)), center)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b) if i not in (3, 4, 6, 7) else a.shape == (2, 5, 0)
    _, stats = ops.layer_norm(x, one, zero, 1e-5, center)
    dx, dw, db = ops.layer_norm_backward(x, one, zero, stats, g, center, 4)
    assert dx.shape == dw.shape == (2, 5, 0) and torch.equal(db, want[4])
    # a change of the weight alone
    still = torch.zeros_like(stats)
    a = ops.layer_norm_backward_jvp(x, one, None, stats, g, None, one, still, None, center, 3)
    zeros = torch.zeros_like(x)
    b = ops.layer_norm_backward_jvp(x, one, None, stats, g, zeros, one, still, zeros, center, 3)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_batch_is_a_loop_and_weights_may_have_it(backend):
    device, ops = backend
    x, v, g, h = (numbers(3, 4, 9, 21, seed=s, dtype=torch.float32).to(device) for s in range(4))
    w, b, u, c = (numbers(3, 21, seed=s, dtype=torch.float32).to(device) for s in range(4))
    got = everything(ops, x, w, b, g, (v, u, c, h), True)
    for i in range(3):
        one = everything(ops, x[i], w[i], b[i], g[i], (v[i], u[i], c[i], h[i]), True)
        assert all(torch.equal(a[i], b) for a, b in zip(got, one, strict=True))


def test_empty(backend):
    device, ops = backend
    for shape in ((0, 5), (2, 0, 5), (3, 0)):
        x, w = torch.ones(shape, device=device), torch.ones(shape[-1], device=device)
        y, y_dot, dx, dw, db, *_ = everything(ops, x, w, w, x, (x, w, w, x), True)
        assert y.shape == y_dot.shape == dx.shape == shape and torch.equal(dw, 0 * w) and torch.equal(db, 0 * w)


def test_nan_and_infinity_stay_in_their_row(backend):
    device, ops = backend
    x, v, g, h = (numbers(6, 40, seed=s, dtype=torch.float32).to(device) for s in range(4))
    want = everything(ops, x, None, None, g, (v, None, None, h), True)
    bad = x.clone()
    bad[1, 3], bad[4, 0] = math.nan, math.inf
    got = everything(ops, bad, None, None, g, (v, None, None, h), True)
    for a, b in zip(got, want, strict=True):
        if a.numel():
            assert a[[1, 4]].isnan().any(-1).all() and torch.equal(a[[0, 2, 3, 5]], b[[0, 2, 3, 5]])


def test_strided_input(backend):
    device, ops = backend
    x, g = numbers(8, 6, seed=0).to(device), numbers(8, 6, seed=1).to(device)
    for view in (lambda t: t[::2], lambda t: t[:, ::2], lambda t: t.t(), lambda t: t[:1].expand(5, 6)):
        a, b = view(x), view(g)
        w = b[0]
        strided = everything(ops, a, w, w, b, (b, w, w, a), True)
        dense = everything(ops, *(t.contiguous() for t in (a, w, w, b)), [t.contiguous() for t in (b, w, w, a)], True)
        assert all(torch.equal(s, d) for s, d in zip(strided, dense, strict=True))


@pytest.mark.parametrize("op, plain, given", [
    (layer_norm, reference.layer_norm, 3), (layer_norm, reference.layer_norm, 1), (rms_norm, reference.rms_norm, 2),
    (rms_norm, reference.rms_norm, 1), (lambda x, b: layer_norm(x[0], None, b),
                                        lambda x, b: reference.layer_norm(x[0], None, b), 2),
], ids=["layer", "layer-x", "rms", "rms-x", "layer-bias"])  # fmt: skip
def test_second_order(op, plain, given):
    check_second_order(op, plain, [numbers(2, 3, 4), numbers(4, seed=1), numbers(4, seed=2)][:given])


def test_reverse_over_forward_is_right():
    """That of torch's own layer norm is not: differences tell."""
    x, v, d = (numbers(3, 4, seed=s) for s in range(3))

    def along(x):
        return jvp(lambda x: layer_norm(x).sin().sum(), (x,), (v,))[1]

    change = (along(x + 1e-5 * d) - along(x - 1e-5 * d)) / 2e-5
    torch.testing.assert_close((grad(along)(x) * d).sum(), change, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4), center=st.booleans(),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99))
def test_any_shape(shape, center, dtype, seed):
    x, w, b = numbers(*shape, seed=seed, dtype=dtype), *(numbers(shape[-1], seed=s, dtype=dtype) for s in (1, 2))
    f, plain = forms(center)
    tolerance = 4 * torch.finfo(dtype).eps
    want = plain(x.double(), w.double(), b.double()).to(dtype)
    torch.testing.assert_close(f(x, w, b), want, atol=20 * tolerance, rtol=tolerance)


def test_vmap_over_weights_and_autocast_dtypes():
    x, w = numbers(5, 7, dtype=torch.bfloat16), numbers(3, 7, seed=1, dtype=torch.float32)
    loss = lambda w: rms_norm(x, w).float().square().sum()
    got = vmap(grad(loss))(w)
    assert got.dtype == torch.float32 and all(torch.equal(a, grad(loss)(b)) for a, b in zip(got, w, strict=True))


def test_only_what_is_wanted_has_a_gradient():
    x, w = numbers(5, 7), numbers(7, seed=1).requires_grad_()
    layer_norm(x, w, w.detach()).square().sum().backward()
    want, = torch.autograd.grad(reference.layer_norm(x, w, w.detach()).square().sum(), w)
    torch.testing.assert_close(w.grad, want)


def test_bad_input():
    x, w = torch.ones(2, 3), torch.ones(3)
    for f in (layer_norm, rms_norm):
        with pytest.raises(TypeError, match="x must be a torch.Tensor, got ndarray"):
            f(np.ones(3))
        with pytest.raises(TypeError, match=r"x must be float64, float32, bfloat16 or float16, got torch\.int64"):
            f(x.long())
        with pytest.raises(ValueError, match=r"x must have at least 1 dimension"):
            f(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"weight must have the shape of a row of x, \(3,\), got \(2,\)"):
            f(x, torch.ones(2))
        with pytest.raises(TypeError, match="weight must have the dtype of x"):
            f(x, w.double())
        with pytest.raises(TypeError, match="eps must be a number, got str"):
            f(x, w, eps="1")
        for eps in (-1.0, math.nan):
            with pytest.raises(ValueError, match="eps must not be negative"):
                f(x, eps=eps)
    with pytest.raises(TypeError, match=r"bias must have the dtype of weight, torch\.float32, got torch\.bfloat16"):
        layer_norm(x.bfloat16(), w, w.bfloat16())
    with pytest.raises(ValueError, match=r"bias must have the shape of a row of x, \(3,\), got \(1, 3\)"):
        layer_norm(x, w, w[None])
