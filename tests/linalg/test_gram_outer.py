"""Gram matrices of layers' per-sample gradients against gradients that are formed, and autograd's own."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradops import linalg
from gradops.linalg import _outer, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Products and sums are in float64 whatever the input is; the sums over tokens cancel, hence relative to the largest.
ROUNDING = 1e-13


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want):
    assert got.dtype == torch.float64 and got.shape == want.shape and torch.equal(got, got.mT)
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING * float(want.abs().max() if want.numel() else 0))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few samples, rows and columns, so that small tests see their edges."""
    monkeypatch.setattr(_outer, "MAX_BYTES", 8 * 70)
    monkeypatch.setattr(_outer, "PAIR_BYTES", 8 * 80)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 7), (1, 4, 2), (3, 1, 5)])
def test_gram_outer(shape, dtype, bias):
    x, g = randn(*shape, dtype=dtype), randn(*shape[:-1], 4, dtype=dtype, seed=1)
    for mode in ("auto", "pairs", "blocks"):
        close(linalg.gram_outer(x, g, bias=bias, mode=mode), reference.gram_outer(x, g, bias=bias))


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(0, 6), tokens=st.integers(0, 5), d=st.integers(0, 6), p=st.integers(0, 6),
       bias=st.booleans(), mode=st.sampled_from(["auto", "pairs", "blocks"]))
def test_gram_outer_of_any_shape(samples, tokens, d, p, bias, mode):
    x, g = randn(samples, tokens, d), randn(samples, tokens, p, seed=1)
    close(linalg.gram_outer(x, g, bias=bias, mode=mode), reference.gram_outer(x, g, bias=bias))


@pytest.mark.parametrize("mode", ["pairs", "blocks"])
def test_blocks_of_bounded_size(small_blocks, mode):
    x, g = randn(7, 3, 11), randn(7, 3, 5, seed=1)
    close(linalg.gram_outer(x, g, mode=mode), reference.gram_outer(x, g))
    if mode == "blocks":
        close(_outer.add_blocks_by_torch(torch.zeros(7, 7).double(), x, g), reference.gram_outer(x, g, bias=False))
    x, g = randn(4, 2, 6, 5, 5), randn(4, 2, 4, 2, 3, seed=1)
    for groups in (1,) if mode == "pairs" else (1, 2):
        got = linalg.gram_conv2d(x, g, (3, 2), stride=(2, 2), padding=(0, 1), groups=groups, mode=mode)
        close(got, reference.gram_conv2d(x, g, (3, 2), stride=(2, 2), padding=(0, 1), groups=groups))
    i, g = torch.randint(0, 9, (5, 4)), randn(5, 4, 6)
    close(linalg.gram_embedding(i, g, 9, mode=mode), reference.gram_embedding(i, g, 9))


@pytest.mark.parametrize("samples, tokens", [(70, (1, 2, 0)), (3, (1, 5, 33)), (1, (4,)), (0, (1, 2))])
def test_layers_in_one_call(backend, samples, tokens):
    """Groups of samples, tiles across them, tokens that divide nothing."""
    device, ops = backend
    x = [randn(samples, t, 3 + i, seed=i).to(device, DTYPES[i]) for i, t in enumerate(tokens)]
    g = [randn(samples, t, 4 - i, seed=9 + i).to(device, DTYPES[i - 1]) for i, t in enumerate(tokens)]
    bias = [i != 1 for i in range(len(x))]
    want = sum(reference.gram_outer(a, b, bias=c) for a, b, c in zip(x, g, bias, strict=True))
    close(ops.gram_outer(x, g, bias), want)


def test_more_layers_than_a_launch_takes(backend):
    device, ops = backend
    x, g = randn(5, 2, 3).to(device), randn(5, 2, 4, seed=1).to(device)
    close(ops.gram_outer([x] * 18, [g] * 18, [True] * 18), 18 * reference.gram_outer(x, g))


def test_wide_layers_are_cut_into_slices(cuda_backend):
    device, ops = cuda_backend
    x, g = randn(3, 1, 1100).to(device), randn(3, 1, 4, seed=1).to(device)
    close(ops.gram_outer([x], [g], [True]), reference.gram_outer(x, g))


@pytest.mark.parametrize("shape", [(3, 600, 5), (2, 257, 1), (300, 1, 3), (20, 60, 4)])
@pytest.mark.parametrize("mode", ["pairs", "blocks"])
def test_many_tokens_and_many_samples(shape, mode):
    x, g = randn(*shape), randn(*shape[:-1], 3, seed=1)
    close(linalg.gram_outer(x, g, mode=mode), reference.gram_outer(x, g))


def test_a_nan_stays_in_its_sample_of_its_layer(backend):
    device, ops = backend
    x, g = randn(4, 3, 5).to(device), randn(4, 3, 2, seed=1).to(device)
    bad = x.clone()
    bad[2, 1, 0] = torch.nan
    got, want = ops.gram_outer([x, bad], [g, g], [True, True]), ops.gram_outer([x, x], [g, g], [True, True])
    keep = torch.tensor([0, 1, 3])
    assert got[2].isnan().all() and torch.equal(got[keep][:, keep], want[keep][:, keep])


def test_layers_that_do_not_fit_together(backend):
    device, ops = backend
    x, g = randn(4, 3, 5).to(device), randn(4, 3, 2).to(device)
    for args, match in [(([x], [g, g], [True]), "one entry per layer"), (([x], [g[:, :2]], [True]), "must be"),
                        (([x, x[:3]], [g, g[:3]], [True] * 2), "must be")]:
        with pytest.raises(RuntimeError, match=match):
            ops.gram_outer(*args)


def test_form_is_chosen_by_cost():
    assert _outer.pairs_pay(8, 1, 10, 10) and _outer.pairs_pay(64, 4, 64, 64) and not _outer.pairs_pay(64, 64, 64, 64)


@pytest.mark.parametrize("mode", ["pairs", "blocks"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": (1, 0)}, {"dilation": (1, 2), "bias": False}])
def test_gram_conv2d(options, mode):
    x = randn(4, 6, 7, 8)
    g = torch.zeros_like(torch.conv2d(x, randn(4, 6, 3, 2), None, *(options.get(o, d) for o, d in
                                                                     (("stride", 1), ("padding", 0), ("dilation", 1)))))
    g += randn(*g.shape, seed=2)
    for dtype in (torch.float64, torch.float32):
        a, b = x.to(dtype), g.to(dtype)
        close(linalg.gram_conv2d(a, b, (3, 2), mode=mode, **options), reference.gram_conv2d(a, b, (3, 2), **options))


@pytest.mark.parametrize("groups", [2, 6])
def test_gram_of_grouped_convolutions(groups):
    x, g = randn(3, 6, 5, 5), randn(3, 12, 5, 5, seed=1)
    close(linalg.gram_conv2d(x, g, 3, padding=1, groups=groups),
          reference.gram_conv2d(x, g, 3, padding=1, groups=groups))


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape, rows", [((5,), 4), ((5, 3), 6), ((5, 3), 1000), ((0, 3), 4)])
def test_gram_embedding(shape, rows, padding_idx):
    i = torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(0))
    g = randn(*shape, 7)
    for mode in ("auto", "pairs", "blocks"):
        got = linalg.gram_embedding(i.int(), g, rows, padding_idx=padding_idx, mode=mode)
        close(got, reference.gram_embedding(i, g, rows, padding_idx=padding_idx))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (0, 3, 5)])
def test_gram_affine(shape, bias):
    x, g = randn(*shape), randn(*shape, seed=1)
    close(linalg.gram_affine(x, g, bias=bias), reference.gram_affine(x, g, bias=bias))


def test_the_gram_is_that_of_autograd():
    layer, x, c = nn.Linear(5, 3).double(), randn(6, 4, 5), randn(6, 4, 3, seed=1)
    y = layer(x)
    losses = (y.tanh() * c).sum((1, 2))
    g, = torch.autograd.grad(losses.sum(), y, retain_graph=True)
    J = torch.stack([torch.cat([t.flatten() for t in torch.autograd.grad(loss, layer.parameters(), retain_graph=True)])
                     for loss in losses])
    close(linalg.gram_outer(x, g), J @ J.mT)


def test_out_is_added_to():
    x, g = randn(3, 2, 4), randn(3, 2, 5, seed=1)
    out = torch.eye(3, dtype=torch.float64)
    assert linalg.gram_outer(x, g, out=out) is out
    close(out, reference.gram_outer(x, g) + torch.eye(3))


@pytest.mark.parametrize("mode", ["pairs", "blocks"])
def test_nan_stays_in_its_sample(mode):
    x, g = randn(4, 3, 5), randn(4, 3, 6, seed=1)
    want = linalg.gram_outer(x, g, mode=mode)
    x[1, 0, 0] = torch.nan
    got = linalg.gram_outer(x, g, mode=mode)
    keep = torch.tensor([0, 2, 3])
    assert got[1].isnan().all() and torch.equal(got[keep][:, keep], want[keep][:, keep])


def test_strided_input_is_not_modified():
    x, g = randn(3, 10, 8)[:, ::2].mT.contiguous().mT, randn(6, 5, 4)[::2]
    before = x.clone(), g.clone()
    close(linalg.gram_outer(x, g), reference.gram_outer(x, g))
    close(linalg.gram_outer(x[:, :1].expand(3, 5, 8), g), reference.gram_outer(x[:, :1].expand(3, 5, 8), g))
    assert torch.equal(x, before[0]) and torch.equal(g, before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 7), (0, 7), (5, 40, 2)])
def test_products_with_the_jacobian(shape, dtype):
    x, g = randn(*shape, dtype=dtype), randn(*shape[:-1], 4, dtype=dtype, seed=1)
    w, V, v = randn(shape[0], seed=2), randn(4, shape[-1], seed=3), randn(4, seed=4)
    eps = 1e-13 if dtype == torch.float64 else 1e-5  # products of narrower input are made in float32
    for bias in (False, True):
        got, want = linalg.outer_vjp(x, g, w, bias=bias), reference.outer_vjp(x, g, w, bias=bias)
        assert got[0].dtype == torch.promote_types(dtype, torch.float32) and (got[1] is None) == (not bias)
        for a, b in zip(got[:1 + bias], want[:1 + bias], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=eps, atol=10 * eps)
        if shape[0]:
            direction = (V, v) if bias else (V,)
            got = linalg.outer_jvp(x, g, *direction)
            torch.testing.assert_close(got, reference.outer_jvp(x, g, *direction), rtol=eps, atol=10 * eps)
            for a, b in zip(linalg.per_sample_stats(x, g, bias=bias), reference.per_sample_stats(x, g, bias=bias),
                            strict=True):
                torch.testing.assert_close(a, b, rtol=eps, atol=10 * eps)


def test_vjp_adds_to_out_and_is_the_transpose_of_jvp():
    x, g, w, V, v = randn(5, 3, 7), randn(5, 3, 4, seed=1), randn(5), randn(4, 7), randn(4)
    weight, bias = torch.ones(4, 7).double(), torch.ones(4).double()
    linalg.outer_vjp(x, g, w, out=(weight, bias))
    lhs = ((weight - 1) * V).sum() + ((bias - 1) * v).sum()
    torch.testing.assert_close(lhs, linalg.outer_jvp(x, g, V, v) @ w)


def test_bad_input():
    x, g = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got ndarray"):
        linalg.gram_outer(np.ones((2, 2)), g)
    with pytest.raises(ValueError, match=r"x must have shape \(B, d\) or \(B, T, d\), got \(4,\)"):
        linalg.gram_outer(x[0, 0], g)
    with pytest.raises(ValueError, match=r"g must have the leading dimensions of x, \(2, 3\)"):
        linalg.gram_outer(x, g[:, :2])
    with pytest.raises(ValueError, match="mode must be one of"):
        linalg.gram_outer(x, g, mode="ghost")
    with pytest.raises(TypeError, match="out must be a float64 tensor, got torch.float32"):
        linalg.gram_outer(x, g, out=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"out must have shape \(2, 2\)"):
        linalg.gram_outer(x, g, out=torch.zeros(3, 3).double())
    with pytest.raises(RuntimeError, match=r"asks for a derivative"):
        linalg.gram_outer(x.clone().requires_grad_(), g)
    with pytest.raises(ValueError, match=r"g must have shape \(2, 1, 'p', 2, 2\)"):
        linalg.gram_conv2d(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), 3)
    with pytest.raises(ValueError, match="groups must divide the channels, 3 in and 4 out, got 2"):
        linalg.gram_conv2d(torch.ones(2, 3, 4, 4), torch.ones(2, 4, 2, 2), 3, groups=2)
    with pytest.raises(TypeError, match="indices must be int32 or int64"):
        linalg.gram_embedding(torch.ones(2, 3), g, 5)
    with pytest.raises(ValueError, match="g must have the shape of indices"):
        linalg.gram_embedding(torch.ones(2, 4).long(), g, 5)
    with pytest.raises(ValueError, match="g must have the shape of x"):
        linalg.gram_affine(x, g)
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), one weight per sample, got \(3,\)"):
        linalg.outer_vjp(x, g, torch.ones(3))
    with pytest.raises(ValueError, match=r"V must have shape \(5, 4\), got \(4, 5\)"):
        linalg.outer_jvp(x, g, torch.ones(4, 5))
