import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradops.curvature import _linear_ce_chunks, linear_ce_ggnvp, linear_cross_entropy, reference

from .second_order import check_second_order

# Sums of H products in float32, and of N; 16-bit inputs are taken as they are, but dz is rounded to their precision.
LOSS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # rounding of the result
GRADIENT = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=[2, 256], ids=["chunks", "whole"])
def chunks(request, monkeypatch):
    """The rows of a chunk, of few rows."""
    monkeypatch.setitem(_linear_ce_chunks._ROWS, "cpu", request.param)


def make(n, h, v, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, h), (v, h), (v,)))
    target = torch.randint(0, v, (n,), generator=g)
    target[1::3] = -100
    return hidden.to(dtype), (2 / h**0.5 * weight).to(dtype), bias.to(dtype), target


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("reduction", "smoothing", "biased"), [("none", 0.1, True), ("mean", 0.0, False),
                                                                ("sum", 0.1, True)])
def test_two_orders(reduction, smoothing, biased, monkeypatch):
    monkeypatch.setitem(_linear_ce_chunks._ROWS, "cpu", 2)
    hidden, weight, bias, target = make(5, 2, 3)

    def of(f):
        return lambda h, w, b=None: f(h, w, target, b, reduction=reduction, label_smoothing=smoothing)

    inputs = (hidden, weight, bias) if biased else (hidden, weight)
    check_second_order(of(linear_cross_entropy), of(reference.linear_cross_entropy), inputs)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 9), h=st.integers(1, 5), v=st.integers(1, 9), dtype=st.sampled_from(list(LOSS)),
       size=st.integers(1, 4), reduction=st.sampled_from(["none", "mean", "sum"]), ignore=st.sampled_from([-100, 0]),
       smoothing=st.sampled_from([0.0, 0.3]), biased=st.booleans())
def test_matches_float64(n, h, v, dtype, size, reduction, ignore, smoothing, biased):
    hidden, weight, bias, target = make(n, h, v, dtype)
    inputs = [hidden, weight, bias][:2 + biased]
    options = {"reduction": reduction, "ignore_index": ignore, "label_smoothing": smoothing}
    target = target.clamp(min=0) if ignore == 0 else target
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_linear_ce_chunks._ROWS, "cpu", size)
        got = linear_cross_entropy(hidden, weight, target, *inputs[2:], **options)
    want = reference.linear_cross_entropy(hidden.double(), weight.double(), target,
                                          *(b.double() for b in inputs[2:]), **options)
    assert got.dtype == dtype and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=LOSS[dtype], atol=4 * LOSS[torch.promote_types(dtype, torch.float32)],
                               equal_nan=True)


def products(f, x, v):
    """The loss, its gradients, and their changes."""
    loss = f(*x)
    gradient, changes = jvp(grad(f, (0, 1, 2)), tuple(x), tuple(v))
    return loss, *gradient, *changes


@pytest.mark.parametrize("dtype", list(GRADIENT))
def test_accuracy(dtype, chunks):
    *x, target = make(70, 48, 500, dtype)
    v = [torch.randn_like(t) for t in x]
    weights = torch.rand(70, dtype=torch.float64)
    for f in (lambda f: lambda h, w, b: f(h, w, target, b),
              lambda f: lambda h, w, b: (weights * f(h, w, target, b, reduction="none")).sum()):
        got = products(f(linear_cross_entropy), x, v)
        want = products(f(reference.linear_cross_entropy), *([t.double() for t in ts] for ts in (x, v)))
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < GRADIENT[dtype]


@pytest.mark.parametrize("masked", [(), (0,), (1,), (0, 2)], ids=str)
def test_in_one_pass_where_it_can(masked, monkeypatch):
    """Products of matrices, by the routes to a gradient and its change: made ahead, or again."""
    count = []
    multiply = _linear_ce_chunks.wide_matmul_
    monkeypatch.setattr(_linear_ce_chunks, "wide_matmul_", lambda *a, **k: count.append(1) or multiply(*a, **k))
    *x, target = make(9, 4, 5)

    def products(f):
        count.clear()
        f()
        return len(count)

    free = [t for i, t in enumerate(x) if i not in masked]

    def loss(*free, reduction="mean"):
        rest = iter(free)
        h, w, b = (t if i in masked else next(rest) for i, t in enumerate(x))
        return linear_cross_entropy(h, w, target, b, reduction=reduction).sum()

    every = tuple(range(len(free)))
    gradients = 2 - len({0, 1} & set(masked))
    assert products(lambda: loss(*free)) == 1
    assert products(lambda: grad(loss, every)(*free)) == 1 + gradients
    assert products(lambda: grad(lambda *x: loss(*x, reduction="none"), every)(*free)) == 2 + gradients
    if not masked:
        assert products(lambda: jvp(grad(loss, every), tuple(free), tuple(free))) == 10


def test_memory():
    """No tensor of the size of the logits, in any pass."""
    h, w, b, target = make(320, 3, 200, torch.float32)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    for reduction in ("mean", "none"):
        leaves = [t.clone().requires_grad_() for t in (h, w, b)]
        with Largest() as seen:
            loss = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], reduction=reduction).sum()
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            torch.autograd.grad(grads, leaves, [h, w, b])
            linear_ce_ggnvp(h, w, h, w, target)
        assert 0 < seen.size <= 80 * 200  # of 320


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn(reduction):
    h, w, b, target = make(4, 3, 5, torch.float32)
    for n in (0, 4):
        x = [t.clone().requires_grad_() for t in (h[:n], w, b)]
        loss = linear_cross_entropy(x[0], x[1], torch.full_like(target[:n], 7), x[2], ignore_index=7,
                                    reduction=reduction)
        assert loss.isnan() if reduction == "mean" else (loss == 0).all()
        grads = torch.autograd.grad(loss.sum(), x, create_graph=True)
        assert all((g == 0).all() and g.shape == t.shape for g, t in zip(grads, x, strict=True))
        assert all((g == 0).all() for g in torch.autograd.grad(grads, x, [torch.ones_like(t) for t in x]))


def test_classes_left_out_and_large_logits(chunks):
    h, w, b, target = make(6, 4, 8)
    b[3], b[7] = -torch.inf, 1e4
    target[target == 3] = 0
    v = [torch.randn_like(t) for t in (h, w, b)]

    def of(f):
        return lambda h, w, b: f(h, w, target, b)

    got, want = (products(of(f), (h, w, b), v) for f in (linear_cross_entropy, reference.linear_cross_entropy))
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c)
        assert a.isfinite().all()


def test_nan_stays_in_its_row():
    h, w, b, target = make(70, 4, 8, torch.float32)
    bad = h.clone()
    bad[2] = torch.nan
    keep = torch.arange(70) != 2

    def rows(h):
        return linear_cross_entropy(h, w, target, b, reduction="none")

    assert rows(bad)[2].isnan() and torch.equal(rows(bad)[keep], rows(h)[keep])
    change = [jvp(grad(lambda h: rows(h).sum()), (x,), (torch.ones_like(h),))[1] for x in (h, bad)]
    assert change[1][2].isnan().all() and torch.equal(change[0][keep], change[1][keep])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", list(GRADIENT))
def test_gauss_newton(reduction, dtype, chunks):
    h, w, _, target = make(9, 16, 40, dtype)
    v = torch.randn_like(h), torch.randn_like(w)
    for dots in (v, (v[0], None), (None, v[1])):
        for t in (target, None):
            got = linear_ce_ggnvp(h, w, *dots, t, reduction=reduction)
            want = reference.linear_ce_ggnvp(h.double(), w.double(), *(None if d is None else d.double() for d in dots), t,
                                             reduction=reduction)
            assert [a.dtype for a in got] == [dtype] * 2
            assert all(relative(a, b) < GRADIENT[dtype] for a, b in zip(got, want, strict=True))
    batch = [t.reshape(3, 3, -1) for t in (h, v[0])]
    for a, b in zip(linear_ce_ggnvp(batch[0], w, batch[1], v[1], target.reshape(3, 3), reduction=reduction),
                    linear_ce_ggnvp(h, w, *v, target, reduction=reduction), strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b)


def test_batches_and_strides():
    h, w, b, target = make(12, 4, 6)
    many = h.reshape(2, 3, 2, 4)
    got = linear_cross_entropy(many, w, target.reshape(2, 3, 2), b, reduction="none")
    assert torch.equal(got.flatten(), linear_cross_entropy(h, w, target, b, reduction="none"))
    strided = linear_cross_entropy(h.mT.contiguous().mT, w.mT.contiguous().mT, target.int(), b)
    torch.testing.assert_close(strided, linear_cross_entropy(h, w, target, b))
    torch.testing.assert_close(linear_cross_entropy(h[0], w, target[0], b), linear_cross_entropy(h[:1], w, target[:1], b))
    batch = vmap(linear_ce_ggnvp, (None, None, 0, 0, None))(h, w, torch.stack([h, h + 1]), torch.stack([w, w]), target)
    torch.testing.assert_close(batch[1][1], linear_ce_ggnvp(h, w, h + 1, w, target)[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    h, w, b, target = make(7, 3, 5)

    def product(h, w, b, v):
        f = lambda h, w: linear_cross_entropy(h, w, target, b, reduction=reduction).sin().sum()
        return jvp(grad(f, (0, 1)), (h, w), (v, w))[1]

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, w, b, h), product(h, w, b, h))


def test_errors():
    h, w, b, target = make(3, 4, 5, torch.float32)
    for args, error, match in (
        ((target, w, target), TypeError, "hidden must be float64"),
        ((h, w.double(), target), TypeError, "weight must have the dtype of hidden"),
        ((h, w[:, :3], target), ValueError, r"weight must have the shape \(V, 4\)"),
        ((h, w, target[:2]), ValueError, r"target must have shape \(3,\)"),
        ((h, w, h[:, 0]), TypeError, "target must hold class indices"),
        ((h, w, target, b[:2]), ValueError, r"bias must have the shape \(5,\)"),
    ):
        with pytest.raises(error, match=match):
            linear_cross_entropy(*args)
    for bad in ({"reduction": "max"}, {"label_smoothing": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            linear_cross_entropy(h, w, target, **bad)
    for t in (5, -1):
        with pytest.raises((ValueError, RuntimeError), match="target"):
            linear_cross_entropy(h, w, torch.full((3,), t))
    with pytest.raises(ValueError, match="h_dot or W_dot must be given"):
        linear_ce_ggnvp(h, w, None, None, target)
    with pytest.raises(ValueError, match="W_dot must have the shape of W"):
        linear_ce_ggnvp(h, w, h, w[1:], target)
    with pytest.raises(RuntimeError, match="W asks for a derivative"):
        linear_ce_ggnvp(h, w.requires_grad_(), h, None, target)
