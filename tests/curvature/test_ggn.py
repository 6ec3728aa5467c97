"""Products with Gauss-Newton and Fisher matrices against the dense ones."""
import pytest
import torch
from torch.nn import functional as F

from gradops.curvature import fvp, ggnvp

from .models import data, flat, outputs, parameters, perceptron, random_like, unflat


@pytest.fixture(scope="module")
def problem():
    model = perceptron()
    params, (x, y) = parameters(model), data()
    f = outputs(model, x)
    J = torch.autograd.functional.jacobian(lambda t: f(unflat(t, params)), flat(params))  # (N, C, P)
    return f, params, y, J, f(params)


def expected(J, H, v):
    """J' H J v for one H (C, C) per example."""
    return torch.einsum("ncp,ncd,nd->p", J, H, J @ v)


def softmax_fisher(z):
    p = z.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_named_losses(problem, reduction):
    f, params, _y, J, z = problem
    v = random_like(params)
    n = len(z) if reduction == "mean" else 1
    close(flat(ggnvp(f, "cross_entropy", params, v, reduction=reduction)), expected(J, softmax_fisher(z) / n, flat(v)))
    eye = torch.eye(3, dtype=torch.float64).expand(len(z), 3, 3)
    close(flat(ggnvp(f, "mse", params, v, reduction=reduction)),
          expected(J, 2 * eye / (z.numel() if n > 1 else 1), flat(v)))


def test_a_loss_of_the_outputs(problem):
    f, params, y, J, z = problem
    v = random_like(params)
    exact = ggnvp(f, "cross_entropy", params, v)
    close(flat(ggnvp(f, lambda z: F.cross_entropy(z, y), params, v)), flat(exact))
    y = y.clone()
    y[2:] = -100
    H = softmax_fisher(z)
    H[2:] = 0
    close(flat(ggnvp(f, lambda z: F.cross_entropy(z, y), params, v)), expected(J, H / 2, flat(v)))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_fisher(problem, likelihood):
    f, params, _, J, z = problem
    v = random_like(params)
    H = softmax_fisher(z) if likelihood == "categorical" else torch.eye(3, dtype=torch.float64).expand(len(z), 3, 3)
    exact = expected(J, H / len(z), flat(v))
    close(flat(fvp(f, params, v, likelihood=likelihood)), exact)
    settings = {"likelihood": likelihood, "mc_samples": 4000}
    sampled = [flat(fvp(f, params, v, **settings, generator=torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    # s s' has relative deviations of order 1 an example: 4000 samples of 8 leave a percent or two.
    assert (sampled[0] - exact).norm() < 0.06 * exact.norm()


def test_modules_and_what_has_no_influence(problem):
    f, params, _, _, _ = problem
    v, x = random_like(params), data()[0]
    v |= {"extra": torch.ones(2, dtype=torch.float64)}
    got = ggnvp(f, "mse", params, {k: v[k] for k in params})
    style = perceptron(), lambda m: m(x)
    module = ggnvp(style, "mse", None, {k: v[k] for k in params})
    assert all(torch.equal(got[k], module[k]) for k in params)
    assert not any(t.requires_grad for t in got.values())
    more = ggnvp(lambda p: f({k: p[k] for k in params}), "mse", params | {"extra": v["extra"]}, v)
    assert torch.equal(more["extra"], torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="depend on none"):
        ggnvp(lambda p: x, "mse", v["extra"], v["extra"])


@torch.library.custom_op("gradops_test::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, g: 3 * ctx.x**2 * g, setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0])
)


def test_refusals():
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(RuntimeError, match="sdpa_kernel"):
        ggnvp(lambda q: F.scaled_dot_product_attention(q, q, q), "mse", x, x)
    with pytest.raises(RuntimeError, match="jvp"):
        ggnvp(lambda x: cube(x), "mse", x, x)
    with pytest.raises(ValueError, match="loss_fn must be one of 'cross_entropy', 'mse', got 'hinge'"):
        ggnvp(lambda x: x, "hinge", x, x)
    with pytest.raises(ValueError, match="reduction is for the named losses"):
        ggnvp(lambda x: x, lambda z: z.sum(), x, x, reduction="sum")
    with pytest.raises(ValueError, match="mc_samples must be an integer >= 0, got -1"):
        fvp(lambda x: x, x, x, mc_samples=-1)
    with pytest.raises(TypeError, match="result of model_fn"):
        ggnvp(lambda x: (x,), "mse", x, x)
    with pytest.raises(TypeError, match="model_fn must be a function"):
        ggnvp(3, "mse", x, x)
