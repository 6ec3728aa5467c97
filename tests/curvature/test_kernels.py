"""Ordinary models under second_order_kernels: the same numbers as torch's, and which calls stay with torch."""
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradops.curvature import fvp, ggnvp, grad_and_hvp, hvp, linearize_grad, second_order_kernels

from .models import Bert, Llama, flat, language_model, parameters, random_like


def close(a, b, tolerance=1e-10):  # products of a few dozen numbers, of models whose second derivatives reach 100
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def used(monkeypatch):
    """The operations of this family that are called, by name."""
    from gradops.curvature import kernels

    names = []

    def spied(name):
        op = getattr(kernels, name)

        def call(*args, **kwargs):
            out = op(*args, **kwargs)
            names.append(name)
            return out

        return call

    for name in ("scaled_dot_product_attention", "rms_norm", "layer_norm", "cross_entropy", "swiglu"):
        monkeypatch.setattr(kernels, name, spied(name))
    return names


@pytest.mark.parametrize("kind, ops", [
    (Llama, {"scaled_dot_product_attention", "rms_norm", "cross_entropy", "swiglu"}),
    (Bert, {"scaled_dot_product_attention", "layer_norm", "cross_entropy"}),
])
def test_language_models(kind, ops, used):
    model, criterion = language_model(kind)
    params = parameters(model)
    v, u = random_like(params), random_like(params, 3)
    style = model, criterion
    with sdpa_kernel(SDPBackend.MATH):
        loss, g, Hv = grad_and_hvp(style, params, v)
    assert not used
    with second_order_kernels():
        found = grad_and_hvp(style, params, v)
        Hu = hvp(style, params, u)[1]
        lin = linearize_grad(style, params)
    assert set(used) == ops
    close(found[0], loss)
    close(flat(found[1]), flat(g))
    close(flat(found[2]), flat(Hv))
    close(flat(lin(v)), flat(Hv))
    close(flat(u) @ flat(Hv), flat(v) @ flat(Hu), 1e-9)
    assert not any(t.requires_grad for t in Hu.values())


@pytest.mark.parametrize("kind", [Llama, Bert])
def test_gauss_newton_and_fisher(kind):
    model, _ = language_model(kind)
    params, ids = parameters(model), torch.randint(1, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    v, style = random_like(params), (model, lambda m: m(ids))
    with sdpa_kernel(SDPBackend.MATH):
        exact = ggnvp(style, "cross_entropy", params, v), ggnvp(style, lambda z: z.square().mean(), params, v)
    with second_order_kernels():
        close(flat(ggnvp(style, "cross_entropy", params, v)), flat(exact[0]))
        close(flat(ggnvp(style, lambda z: z.square().mean(), params, v)), flat(exact[1]))
        close(flat(fvp(style, params, v)), flat(exact[0]))


def test_functional_transforms():
    model, _ = language_model(Llama)
    params = parameters(model)
    v = random_like(params)
    ids = torch.tensor([[1, 2, 3, 4]])

    def f(p):
        return F.cross_entropy(functional_call(model, p, (ids,))[0], ids[0].roll(1))

    def nested():
        return jvp(grad(f), (params,), (v,))[1], vmap(lambda s: grad(f)({k: s * t for k, t in params.items()}))(
            torch.tensor([1.0, 2.0], dtype=torch.float64))

    with sdpa_kernel(SDPBackend.MATH):
        exact = nested()
    with second_order_kernels():
        found = nested()
    for a, b in zip(found, exact, strict=True):
        close(flat(a), flat(b))


def test_the_backward_pass_may_come_after(used):
    q = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    with second_order_kernels():
        y = F.scaled_dot_product_attention(q, q, q)
    assert used and "ScaledDotProductAttentionForward" in y.grad_fn.name()
    (g,) = torch.autograd.grad(y.sum(), q, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), q)[0].abs().sum() > 0
    assert "Scaled" not in F.silu(q).grad_fn.name() and len(used) == 1


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


X, Q, T = numbers(2, 3, 4), numbers(1, 2, 3, 4), torch.tensor([0, 3])
TAKEN = {
    "silu": lambda: F.silu(X), "SiLU": lambda: nn.SiLU()(X), "rms": lambda: F.rms_norm(X, (4,)),
    "RMSNorm": lambda: nn.RMSNorm(4, dtype=torch.float64)(X), "rms-bf16": lambda: F.rms_norm(1e-3 * X.bfloat16(), (4,)),
    "layer": lambda: F.layer_norm(X, [4], eps=1e-3),
    "LayerNorm": lambda: nn.LayerNorm(4, dtype=torch.float64)(X), "ce": lambda: F.cross_entropy(X[0, :2], T),
    "ce-dims": lambda: F.cross_entropy(X, torch.tensor([[0, 1, 2, 2], [0, -100, 0, 1]]), reduction="none"),
    "sdpa": lambda: F.scaled_dot_product_attention(Q, Q, Q, is_causal=True, scale=0.3),
    "mask": lambda: F.scaled_dot_product_attention(Q, Q, Q, torch.ones(3, 3, dtype=torch.bool).tril()),
}  # fmt: skip
STAYING = {
    "dropout": lambda: F.scaled_dot_product_attention(Q, Q, Q, dropout_p=1e-9),
    "mask-grad": lambda: F.scaled_dot_product_attention(Q, Q, Q, Q[..., :3].detach().clone().requires_grad_()),
    "inplace": lambda: F.silu(X.clone(), inplace=True), "dims": lambda: F.layer_norm(X, (3, 4)),
    "rms-dims": lambda: F.rms_norm(X, (3, 4)), "weights": lambda: F.cross_entropy(X[0, :2], T, numbers(4).abs()),
    "probabilities": lambda: F.cross_entropy(X[0], X[1].softmax(-1)), "complex": lambda: F.silu(X.to(torch.complex128)),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case, used):
    expected = TAKEN[case]()
    with second_order_kernels():
        # bfloat16 numbers here are rounded once; torch rounds before the weight too.
        torch.testing.assert_close(TAKEN[case](), expected, rtol=1e-2 if "bf16" in case else 1e-12, atol=1e-12)
    assert len(used) == 1


@pytest.mark.parametrize("case", STAYING)
def test_left_to_torch(case, used):
    expected = STAYING[case]()
    with second_order_kernels():
        assert torch.equal(STAYING[case](), expected)
    assert not used


def test_errors_and_autocast_are_those_of_torch(used):
    with second_order_kernels():
        with pytest.raises(IndexError, match="out of bounds"):
            F.cross_entropy(X[0, :2], T + 9)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(X, (5,))
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(Q.float(), Q.float(), Q.float()).dtype == torch.bfloat16
    assert not used


def test_compiled_model(used):
    model, criterion = language_model(Llama, torch.float32)
    with second_order_kernels():
        expected = criterion(model)
        g = torch.autograd.grad(expected, list(model.parameters()))
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        value = compiled(model)
        torch.testing.assert_close(value, expected)
        for a, b in zip(torch.autograd.grad(value, list(model.parameters())), g, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def inside(x):
        with second_order_kernels():
            return F.silu(x) + F.layer_norm(x, (4,))

    torch.testing.assert_close(torch.compile(inside, fullgraph=True, backend="aot_eager")(X), inside(X))


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1, attn_implementation="sdpa")
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).double(), torch.tensor([[1, 2, 3, 4]])
    style, params = (model, lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss), parameters(model)
    v = random_like(params)
    with sdpa_kernel(SDPBackend.MATH):
        Hv = hvp(style, params, v)[1]
    with second_order_kernels():
        close(flat(hvp(style, params, v)[1]), flat(Hv), 1e-6)  # its norms compute in float32
