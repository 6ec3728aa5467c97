"""Small models, and what torch says about them in float64."""
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


def perceptron(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)


def data(dtype=torch.float64, n=8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64).to(dtype), torch.randint(3, (n,), generator=g)


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def outputs(model, x):
    return lambda params: functional_call(model, params, (x,))


def loss(model, x, y):
    return lambda params: F.cross_entropy(functional_call(model, params, (x,)), y)


def flat(tree):
    return torch.cat([tree[name].reshape(-1) for name in tree])


def unflat(x, like):
    parts = x.split([t.numel() for t in like.values()])
    return {name: part.view_as(t) for (name, t), part in zip(like.items(), parts, strict=True)}


def dense(f, params):
    """The Hessian of f as a matrix, by torch."""
    return torch.autograd.functional.hessian(lambda x: f(unflat(x, params)), flat(params))


def random_like(params, seed=2):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for k, p in params.items()}
