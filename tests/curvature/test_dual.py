"""Forward over reverse: the same products as double backward, whatever a loss is made of, and never a zero instead."""
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradops.curvature import _dual, grad_and_hvp, hvp, layer_norm, second_order_kernels, swiglu
from gradops.curvature._functions import Gradient, resolve
from gradops.curvature._linear import linear

from .models import flat, loss, parameters, perceptron, random_like


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def double_backward(f, x, v):
    function, tree = resolve(f, x)
    return Gradient.of(function, tree, False, values=False)[0].product(tree.vector(v)[0], keep=False)[0]


@pytest.fixture
def doubled(monkeypatch):
    """How often a product went through double backward."""
    calls = []

    product = Gradient.product

    def counted(self, v, keep):
        calls.append(keep)
        return product(self, v, keep)

    monkeypatch.setattr(Gradient, "product", counted)
    return calls


def test_linear():
    x, w, b = numbers(2, 3, 4), numbers(5, 4, seed=1), numbers(5, seed=2)
    op = lambda x, w, b=None: linear(x, w, b, False, False, False)
    for inputs in ((x, w, b), (x[0, 0], w, b), (x, w)):
        close(op(*inputs), F.linear(*inputs))
        points = [t.clone().requires_grad_() for t in inputs]
        assert gradcheck(op, points, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(op, points, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def test_shared_weights_whose_gradient_is_left_out(doubled):
    model, x = nn.Linear(4, 4).double(), numbers(3, 4)

    def f(m):
        other = F.linear(x, m.weight.mT.sin())
        return F.mse_loss(m(torch.tanh(m(x))), x) + (m.weight**3).sum() + other.square().sum()

    params = parameters(model)
    v = random_like(params)
    _, g, Hv = grad_and_hvp((model, f), params, v)
    assert torch.equal(flat(hvp((model, f), params, v)[1]), flat(Hv)) and not doubled
    _, tree = resolve((model, f), params)
    exact = Gradient.of(*resolve((model, f), params), False, values=True)[0]
    close(g["weight"], exact.values[0])
    for a, b in zip(Hv.values(), exact.product(tree.vector(v)[0], keep=False), strict=True):
        close(a, b)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class CubeBoth(Cube):
    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.saved_tensors[0] ** 2 * t


class Opaque(CubeBoth):
    """Its backward pass cannot be seen into, by neither mode."""

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy((3 * ctx.saved_tensors[0].detach() ** 2 * g.detach()).numpy())


@torch.library.custom_op("gradops_test::cubed", mutates_args=())
def cubed(x: torch.Tensor) -> torch.Tensor:
    return x**3


cubed.register_autograd(
    lambda ctx, g: 3 * ctx.x**2 * g, setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]))

W = numbers(4, 4, seed=5)


def semigradient(x):
    with torch.no_grad():
        target = swiglu(F.linear(x, W)) + layer_norm(x).exp() + x.sin()
    return (F.linear(x, W) - target).square().sum()


def inner_gradient(x):
    y = x.sin().requires_grad_() if not x.requires_grad else x.sin()
    return (x * torch.autograd.grad(y.square().sum(), y, retain_graph=True)[0].exp()).sum() + x.prod()


def in_place(x):
    y = F.linear(x, W)
    with torch.no_grad():
        y.mul_(2)
    y[0] = x[0] ** 2
    return y.relu_().square().sum()


def detached(x):
    y = x.square()
    z = F.linear(y.clone(), W).exp()
    y.detach_()
    return (z * y + x.detach() * x**3 + x.data * x**2).sum()


def grouped(x):
    return F.group_norm(F.linear(x, W), 2).pow(3).sum()


LOSSES = {  # how f is called, and whether double backward is what makes the product
    "mlp": (lambda x: F.cross_entropy(F.linear(F.gelu(F.linear(x, W)), W), torch.tensor([0, 1, 2])), 1, False),
    "silu": (lambda x: F.silu(F.linear(x, W)).square().sum(), 1, False),
    "silu-inplace": (lambda x: F.silu(F.linear(x, W), inplace=True).square().sum(), 2, True),
    "mse": (lambda x: F.mse_loss(F.linear(x, W).tanh(), W[:3]), 1, False),
    "semigradient": (semigradient, 1, False), "inner-gradient": (inner_gradient, 1, True),
    "in-place": (in_place, 2, True), "detached": (detached, 1, True), "group-norm": (grouped, 1, True),
    "mish": (lambda x: F.mish(x).sum(), 1, True), "aten-silu": (lambda x: torch.ops.aten.silu(x).sum(), 1, True),
    "convolution": (lambda x: F.conv1d(x[None], torch.ones_like(W)[:, :3, None]).exp().sum(), 1, True),
    "transform": (lambda x: torch.func.grad(lambda y: (F.linear(y, W) ** 3).sum())(x).square().sum(), 1, True),
    "jacobian": (lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1].square().sum(), 2, True),
    "checkpoint": (lambda x: checkpoint(lambda x: F.linear(x, W).exp(), x, use_reentrant=False).sum(), 1, True),
    "no-jvp": (lambda x: Cube.apply(F.linear(x, W)).sum(), 2, True),
    "jvp": (lambda x: CubeBoth.apply(F.linear(x, W)).sum(), 1, True),
    "custom-op": (lambda x: cubed(F.linear(x, W)).sum(), 2, True),
    "hook": (lambda x: (x.register_hook(lambda g: g**2), F.linear(W, x).square().sum())[1], 1, True),
    "unbind": (lambda x: sum(a.prod() * b.sin().sum() for a, b in zip(x.unbind(), x.split(1), strict=True)), 1, False),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
def test_equals_double_backward(case, doubled):
    f, calls, falls_back = LOSSES[case]
    x, v, seen = numbers(3, 4), numbers(3, 4, seed=1), []
    exact = double_backward(f, x, v)
    doubled.clear()
    _, Hv = hvp(lambda x: seen.append(0) or f(x), x, v)
    close(Hv, exact)
    assert Hv.abs().sum() > 0 and len(seen) == calls and bool(doubled) == falls_back
    assert torch._C._is_fwd_grad_enabled() and torch.autograd.forward_ad._current_level == -1


def test_never_a_zero_instead():
    x, v = numbers(3, 4), numbers(3, 4, seed=1)
    for f in (lambda x: Opaque.apply(x).sum(), lambda x: Opaque.apply(F.linear(x, W)).square().sum()):
        with pytest.raises(RuntimeError, match="OpaqueBackward: its backward pass has no derivative"):
            hvp(f, x, v)

    class Node:
        def name(self):
            return "torch::autograd::CppNode<SomebodysFunction>"

    assert not _dual._safe(Node())


def test_random_numbers_are_the_same_after_a_second_start(doubled):
    x, v = numbers(3, 4), numbers(3, 4, seed=1)
    f = lambda x: Cube.apply(F.dropout(F.linear(x, W))).sum()
    torch.manual_seed(3)
    exact = double_backward(f, x, v)
    torch.manual_seed(3)
    close(hvp(f, x, v)[1], exact)
    assert doubled


def test_attention_and_aux(doubled):
    q, k, v = numbers(1, 2, 3, 4), numbers(1, 2, 3, 4, seed=1), numbers(1, 2, 3, 4, seed=2)
    f = lambda p: F.scaled_dot_product_attention(p[0], p[1], p[0], is_causal=True).square().sum()
    with second_order_kernels():
        _, Hv, seen = hvp(lambda p: (f(p), p[0] * 2), [q, k], [v, q], has_aux=True)
        assert not doubled and torch.equal(seen, 2 * q)
        assert torch.autograd.forward_ad._current_level == -1
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = hvp(f, [q, k], [v, q])[1]
    assert doubled
    for a, b in zip(Hv, exact, strict=True):
        close(a, b)


def test_small_models_go_through_double_backward(doubled, monkeypatch):
    x, f = numbers(3, 4), LOSSES["mlp"][0]
    Hx = hvp(f, x, x)[1]
    assert not doubled
    monkeypatch.setattr(_dual, "SMALL", 13)
    close(hvp(f, x, x)[1], Hx)
    assert doubled


def test_inside_of_other_forward_modes():
    model, x = perceptron(), numbers(8, 4)
    f, params = loss(model, x, torch.zeros(8, dtype=torch.long)), parameters(model)
    v = random_like(params)
    with torch.autograd.forward_ad.dual_level():
        inside = hvp(f, params, v)[1]
    with torch.autograd.graph.save_on_cpu():
        packed = hvp(f, params, v)[1]
    for found in (inside, packed):
        close(flat(found), flat(hvp(f, params, v)[1]))


def test_compile_is_refused_where_it_would_be_part_of_a_graph():
    x = torch.ones(2)
    with pytest.raises(Exception, match="products with a Hessian are made of autograd's own calls"):
        torch.compile(lambda x: hvp(lambda x: (x**3).sum(), x, x)[1], fullgraph=True, backend="eager")(x)
