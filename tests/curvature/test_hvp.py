"""Products with the Hessian of a model against the dense matrix of torch, and what they refuse."""
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from gradops.curvature import grad_and_hvp, hvp, linearize_grad

from .models import data, dense, flat, loss, parameters, perceptron, random_like


@pytest.fixture(scope="module")
def problem():
    model = perceptron()
    params, f = parameters(model), loss(model, *data())
    return model, params, f, dense(f, params)


def close(a, b, tolerance=1e-12):  # products of a dozen numbers near 1, in float64
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_equals_the_dense_hessian(problem):
    _, params, f, H = problem
    v = random_like(params)
    value, Hv = hvp(f, params, v)
    close(flat(Hv), H @ flat(v))
    close(value, f(params))
    assert list(Hv) == list(params) and not value.requires_grad
    value, g, Hv2 = grad_and_hvp(f, params, v)
    close(flat(g), flat(grad(f)(params)))
    assert torch.equal(flat(Hv), flat(Hv2)) and not any(t.requires_grad for t in (*g.values(), *Hv2.values()))


def test_linearized_gradient(problem):
    _, params, f, H = problem
    lin = linearize_grad(f, params)
    close(flat(lin.grad), flat(grad(f)(params)))
    assert lin.loss == f(params)
    vs = [random_like(params, seed) for seed in (3, 4, 5)]
    one_by_one = [lin(v) for v in vs]
    for v, Hv in zip(vs, one_by_one, strict=True):
        close(flat(Hv), H @ flat(v))
    together = lin({name: torch.stack([v[name] for v in vs]) for name in params})
    for k, Hv in enumerate(one_by_one):
        assert torch.equal(flat({n: t[k] for n, t in together.items()}), flat(Hv))
    none = lin({name: p.new_empty(0, *p.shape) for name, p in params.items()})
    assert all(t.shape == (0, *params[name].shape) for name, t in none.items())


def test_symmetric_in_float32():
    model = perceptron(torch.float32)
    params = parameters(model)
    lin = linearize_grad(loss(model, *data(torch.float32)), params)
    u, v = random_like(params, 3), random_like(params, 4)
    Hu, Hv = flat(lin(u)), flat(lin(v))
    gap = (flat(u) @ Hv - flat(v) @ Hu).abs()
    assert gap <= 1e-6 * max(flat(u).norm() * Hv.norm(), flat(v).norm() * Hu.norm())


def test_kinds_of_pytrees():
    f = lambda p: (p["a"][0] ** 2 * p["a"][1]).sum() + p["b"][0] ** 3
    t = lambda *x: torch.tensor(x, dtype=torch.float64)
    params = {"a": [t(1.0, 2.0), t(3.0, 4.0)], "b": (torch.tensor(2.0, dtype=torch.float64),)}
    v = {"b": (torch.tensor(1.0, dtype=torch.float64),), "a": [t(1.0, 0.0), t(0.0, 1.0)]}  # any order of names
    value, Hv = hvp(f, params, v)
    close(Hv["a"][0], t(6.0, 4.0))
    close(Hv["a"][1], t(2.0, 0.0))
    assert isinstance(Hv["b"], tuple) and Hv["b"][0] == 12 and value == 3 + 16 + 8
    close(hvp(lambda x: (x**3).sum(), nn.Parameter(t(1.0, 2.0)), t(1.0, 1.0))[1], t(6.0, 12.0))
    x = torch.randn(4, 6, dtype=torch.float64)[:, ::2]  # not contiguous, and v broadcast
    close(hvp(lambda x: (x**3).sum(), x, torch.ones(1, 1, dtype=torch.float64).expand(4, 3))[1], 6 * x)


def test_aux(problem):
    _, params, f, _ = problem
    v = random_like(params)
    _value, Hv, aux = hvp(lambda p: (f(p), "seen"), params, v, has_aux=True)
    assert aux == "seen" and torch.equal(flat(Hv), flat(hvp(f, params, v)[1]))
    assert linearize_grad(lambda p: (f(p), 7), params, has_aux=True).aux == 7
    with pytest.raises(TypeError, match="has_aux=True"):
        hvp(f, params, v, has_aux=True)


def test_module_style(problem):
    model, params, f, _ = problem
    x, y = data()
    style = model, lambda m: F.cross_entropy(m(x), y)
    v = random_like(params)
    assert torch.equal(flat(hvp(style, None, v)[1]), flat(hvp(f, params, v)[1]))
    some = {"3.weight": model[3].weight}
    Hv = hvp(style, some, {"3.weight": v["3.weight"]})[1]
    assert list(Hv) == ["3.weight"] and all(p.grad is None for p in model.parameters())
    frozen = perceptron().requires_grad_(False)
    frozen[3].requires_grad_(True)
    Hv = hvp((frozen, style[1]), None, {k: v[k] for k in ("3.weight", "3.bias")})[1]
    assert list(Hv) == ["3.weight", "3.bias"]
    with pytest.raises(ValueError, match=r"params\['weight'\] is not a parameter of Sequential"):
        hvp(style, {"weight": model[3].weight}, some)
    with pytest.raises(TypeError, match="may be None only"):
        hvp(f, None, v)


def test_shared_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.outer.weight = self.inner.weight

        def forward(self, x):
            return self.outer(torch.tanh(self.inner(x)))

    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(5, 3, dtype=torch.float64)
    W = model.inner.weight.detach()
    H = torch.autograd.functional.hessian(lambda w: ((torch.tanh(x @ w.mT) @ w.mT) ** 2).sum(), W)
    v = torch.randn_like(W)
    Hv = hvp((model, lambda m: (m(x) ** 2).sum()), None, {"inner.weight": v})[1]
    close(Hv["inner.weight"], (H.view(9, 9) @ v.view(9)).view(3, 3), 1e-10)
    with pytest.raises(ValueError, match=r"params\[1\] is the same tensor as params\[0\]"):
        hvp(lambda p: (p[0] * p[1]).sum(), [W, W], [v, v])


def test_running_statistics_and_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, y = data()
    before = {k: b.clone() for k, b in model.named_buffers()}
    params, style = parameters(model), (model, lambda m: F.cross_entropy(m(x), y))
    v = random_like(params)
    torch.manual_seed(5)
    lin = linearize_grad(style, None)
    assert torch.equal(flat(lin(v)), flat(lin(v)))  # one mask
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())

    def again(p):
        torch.manual_seed(5)
        state = {k: b.clone() for k, b in before.items()} | p
        return F.cross_entropy(functional_call(model, state, (x,)), y)

    close(flat(lin(v)), dense(again, params) @ flat(v))


def test_without_influence_and_linear():
    one, two = torch.ones(2), torch.ones(3)
    _, Hv = hvp(lambda p: (p[0] ** 2).sum(), [one, two], [one, two])
    assert torch.equal(Hv[0], 2 * one) and torch.equal(Hv[1], 0 * two)
    _, Hv = hvp(lambda p: (p[0] ** 2).sum() + p[1].sum(), [one, two], [one, two])
    assert torch.equal(Hv[1], 0 * two)
    assert torch.equal(hvp(lambda x: x.sum(), one, one)[1], 0 * one)
    empty = hvp(lambda p: (p[0] ** 2).sum() + p[1].sum(), [one, one[:0]], [one, one[:0]])[1]
    assert empty[1].shape == (0,)
    with pytest.raises(ValueError, match="depends on none of params"):
        hvp(lambda x: (two**2).sum(), one, one)
    with pytest.raises(ValueError, match="depends on none of params"):
        hvp(lambda x: (two.clone().requires_grad_() ** 2).sum(), one, one)


def test_in_any_mode():
    x = torch.ones(2)
    with torch.no_grad():
        assert torch.equal(hvp(lambda x: (x**3).sum(), x, x)[1], 6 * x)
    with torch.inference_mode():
        assert torch.equal(hvp(lambda x: (x**3).sum(), torch.ones(2), x)[1], 6 * x)


def test_compile():
    x = torch.ones(2)
    compiled = torch.compile(lambda x, v: hvp(lambda x: (x**3).sum(), x, v)[1] + 1, backend="eager")
    assert torch.equal(compiled(x, x), 6 * x + 1)

    def compiled_model(x):  # what torch says to a second backward pass through one
        raise RuntimeError("torch.compile with aot_autograd does not currently support double backward")

    with pytest.raises(RuntimeError, match="_orig_mod"):
        hvp(compiled_model, x, x)


def test_checkpointed_model_and_nan(problem):
    from torch.utils.checkpoint import checkpoint

    model, params, _f, H = problem
    x, y = data()
    v = random_like(params)
    recomputed = lambda m: F.cross_entropy(m[3](checkpoint(m[:3], x, use_reentrant=False)), y)
    close(flat(hvp((model, recomputed), None, v)[1]), H @ flat(v))
    Hv = hvp(lambda p: (p[0] ** 3).sum() + (p[1] ** 3).sum(), [x[0], x[1]], [x[0] * float("nan"), x[1]])[1]
    assert Hv[0].isnan().all() and not Hv[1].isnan().any()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Opaque(torch.autograd.Function):
    """A backward pass that autograd does not see, as that of a raw kernel."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return 3 * ctx.saved_tensors[0] ** 2 * g


def test_no_second_derivative_is_an_error():
    q = torch.randn(1, 2, 8, 4)
    attend = lambda q: F.scaled_dot_product_attention(q, q, q).square().sum()
    with pytest.raises(RuntimeError, match="sdpa_kernel"):
        hvp(attend, q, q)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert hvp(attend, q, q)[1].abs().sum() > 0
    with pytest.raises(RuntimeError, match="once_differentiable"):  # torch alone says 0 to the first of these
        hvp(lambda x: Once.apply(x).sum(), q, q)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        hvp(lambda x: Once.apply(x).square().sum(), q, q)
    with pytest.raises(RuntimeError, match="OpaqueBackward: its backward pass has no derivative"):
        hvp(lambda x: Opaque.apply(x).sum(), q, q)


def test_bad_arguments(problem):
    _, params, f, _ = problem
    v, x = random_like(params), torch.ones(2)
    with pytest.raises(TypeError, match=r"v\['0.weight'\] must have the dtype of params\['0.weight'\], torch.float64"):
        hvp(f, params, v | {"0.weight": v["0.weight"].float()})
    with pytest.raises(ValueError, match=r"v\['0.bias'\] must have the shape of params\['0.bias'\], \(6,\)"):
        hvp(f, params, v | {"0.bias": v["0.bias"][:5]})
    with pytest.raises(ValueError, match=r"structure of params; they differ in \['more'\]"):
        hvp(f, params, v | {"more": x})
    with pytest.raises(ValueError, match="first axis of 2 as in the other leaves"):
        linearize_grad(f, params)({n: torch.stack([t, t]) if n != "3.bias" else t for n, t in v.items()})
    with pytest.raises(TypeError, match="params must be float64, float32, bfloat16 or float16, got torch.complex64"):
        hvp(lambda x: x.abs().sum(), x.to(torch.complex64), x)
    with pytest.raises(TypeError, match="params must be a torch.Tensor, got generator"):
        hvp(f, (p for p in params.values()), v)
    with pytest.raises(ValueError, match="at least one tensor"):
        hvp(f, {}, {})
    with pytest.raises(ValueError, match="one real number"):
        hvp(lambda x: x * 2, x, x)
    with pytest.raises(TypeError, match="result of f must be a torch.Tensor"):
        hvp(lambda x: 2.0, x, x)
    with pytest.raises(TypeError, match="f must be a function"):
        hvp(x, x, x)
    with pytest.raises(TypeError, match="nn.Module, function"):
        hvp((x, x), None, x)
    cubic = lambda x: (x**3).sum()
    with pytest.raises(RuntimeError, match="v asks for a derivative"):
        hvp(cubic, x, x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="outside of torch.func transforms"):
        grad(lambda x: hvp(cubic, x, torch.ones(2))[1].sum())(x)
    with pytest.raises(RuntimeError, match="outside of torch.func transforms"):
        vmap(lambda v: hvp(cubic, x, v)[1])(torch.ones(3, 2))


def test_parameters_changed_under_a_linearized_gradient():
    x = torch.ones(2)
    lin = linearize_grad(lambda x: (x**3).sum(), x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lin(torch.ones(2))
