"""What every operation with kernels of two orders is built on, tried on y = w x^2 with kernels in plain torch."""
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap

from gradops.curvature._second_order import Kernels, differentiable

from .second_order import check_second_order

calls = []


def or_zero(t):
    return 0 if t is None else t


def forward(x, c):
    calls.append("forward")
    x, w = x
    return [c[0] * w * x * x, x * x]


def backward(x, c, out, g, wanted):
    calls.append("backward")
    return [2 * c[0] * x[1] * x[0] * g, c[0] * out[1] * g]


def change(x, c, out, x_dot):
    calls.append("jvp")
    x_dot, w_dot = map(or_zero, x_dot)
    return [c[0] * (w_dot * out[1] + 2 * x[1] * x[0] * x_dot), 2 * x[0] * x_dot + torch.zeros_like(x[0])]


def backward_jvp(x, c, out, g, x_dot, out_dot, g_dot, wanted):
    calls.append("backward_jvp")
    (x, w), (x_dot, w_dot), g_dot = x, map(or_zero, x_dot), or_zero(g_dot)
    return [2 * c[0] * (w_dot * x * g + w * x_dot * g + w * x * g_dot), c[0] * (out_dot[1] * g + out[1] * g_dot)]


def dual(x, c, x_dot):
    out = forward(x, c)
    return out, change(x, c, out, x_dot)


def backward_dual(x, c, out, g, *rest):
    return backward(x, c, out, g, None), backward_jvp(x, c, out, g, *rest)


PLAIN = Kernels(forward, backward, change, backward_jvp)
FUSED = Kernels(forward, backward, change, backward_jvp, dual, backward_dual)


@pytest.fixture(params=[PLAIN, FUSED], ids=["four", "dual"])
def op(request):
    call = differentiable("squares", request.param, inputs=2, constants=1, outputs=2)
    return lambda x, w: call(x, w, 0.5)


def reference(x, w):
    return 0.5 * w * x * x


def numbers(*seeds, **options):
    random = (torch.Generator().manual_seed(seed) for seed in seeds)
    return [torch.randn(3, 4, dtype=torch.float64, generator=r, **options) for r in random]


def test_the_check_of_every_operation(op):
    check_second_order(op, reference, numbers(0, 1))


def test_the_check_sees_a_missing_term():
    def without_a_term(*args):
        return backward_jvp(*args[:4], [args[4][0], None], *args[5:])

    kernels = Kernels(forward, backward, change, without_a_term)
    call = differentiable("squares", kernels, inputs=2, constants=1, outputs=2)
    with pytest.raises((AssertionError, RuntimeError)):
        check_second_order(lambda x, w: call(x, w, 0.5), reference, numbers(0, 1))


def test_gradcheck(op):
    x = [t.requires_grad_() for t in numbers(0, 1)]
    assert gradcheck(op, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(op, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("nested", [
    lambda f, x, w, v: jvp(grad(f, (0, 1)), (x, w), (v, w.sin()))[1],
    lambda f, x, w, v: jvp(lambda x: grad(f, (0, 1))(x, w), (x,), (v,))[1],
    lambda f, x, w, v: grad(lambda x, w: jvp(f, (x, w), (v, w.sin()))[1], (0, 1))(x, w),
    lambda f, x, w, v: hessian(f)(x, w),
    lambda f, x, w, v: jacrev(jacrev(f))(x, w),
    lambda f, x, w, v: vmap(lambda v: jvp(grad(f, (0, 1)), (x, w), (v, v))[1])(torch.stack([v, 2 * v])),
    lambda f, x, w, v: vmap(grad(f, 1), (0, None))(torch.stack([x, v]), w),
], ids=["jvp-grad", "jvp-grad-of-one", "grad-jvp", "hessian", "jacrev-jacrev", "vmap-jvp-grad", "vmap-grad"])
def test_transforms(op, nested):
    def loss(f):
        return lambda x, w: f(x, w).sin().sum()

    torch.testing.assert_close(nested(loss(op), *numbers(0, 1, 2)), nested(loss(reference), *numbers(0, 1, 2)))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kernels", [PLAIN, FUSED], ids=["four", "dual"])
def test_forward_over_reverse(kernels, graph):
    """Raw forward mode around a backward pass; with fused kernels in two passes, unless a graph of it is wanted."""
    call = differentiable("squares", kernels, inputs=2, constants=1, outputs=2)
    x, w, v = numbers(0, 1, 2)
    points = [t.detach().requires_grad_() for t in (x, w)]
    calls.clear()
    with forward_ad.dual_level():
        loss = call(forward_ad.make_dual(points[0], v), points[1], 0.5).sin().sum()
        grads = torch.autograd.grad(loss, points, create_graph=graph)
        got = [forward_ad.unpack_dual(g).tangent.detach() for g in grads]
    want = jvp(lambda x: grad(lambda x, w: reference(x, w).sin().sum(), (0, 1))(x, w), (x,), (v,))[1]
    torch.testing.assert_close(got, list(want))
    assert calls == ["forward", "jvp", "backward", "backward_jvp"]


def test_compile(op):
    f = torch.compiler.allow_in_graph(op)

    def product(x, w, v):
        return jvp(grad(lambda x, w: f(x, w).sin().sum(), (0, 1)), (x, w), (v, v))[1]

    args = numbers(0, 1, 2)
    torch.testing.assert_close(torch.compile(product, fullgraph=True, backend="aot_eager")(*args), product(*args))


def test_only_what_is_wanted(op):
    x, w = numbers(0, 1)
    x.requires_grad_()
    calls.clear()
    op(x, w).sum().backward()
    assert calls == ["forward", "backward"] and torch.equal(x.grad, w * x.detach())


def test_no_third_order(op):
    x, w, v = numbers(0, 1, 2)
    with pytest.raises(RuntimeError, match="squares: derivatives of the third order are not supported"):
        grad(lambda s: hessian(lambda t: op(t * x, w).sin().sum())(s))(torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="forward-mode derivatives of forward-mode derivatives"):
        jvp(lambda y: jvp(lambda x: op(x, w), (y,), (v,))[1], (x,), (v,))
