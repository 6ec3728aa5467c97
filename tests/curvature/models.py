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


class Llama(nn.Module):
    """A decoder as Hugging Face writes it: a norm in plain torch, grouped heads, rotary positions, a gated MLP."""

    def __init__(self, width=8, heads=4, groups=2, vocabulary=11):
        super().__init__()
        self.heads, self.groups, size = heads, groups, width // heads
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 12, bias=False) for _ in range(2))
        self.down, self.act = nn.Linear(12, width, bias=False), nn.SiLU()
        self.scale, self.norm = nn.Parameter(torch.ones(width)), nn.RMSNorm(width)
        self.register_buffer("angles", torch.arange(16.0)[:, None] * torch.ones(size // 2).repeat(2))

    def rms(self, x):
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def rotate(self, x):
        angles = self.angles[: x.shape[-2]].to(x.dtype)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def forward(self, ids):
        x = self.embed(ids)
        h = self.rms(x)
        q, k, v = (f(h).view(*ids.shape, n, -1).transpose(1, 2)
                   for f, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups)))
        a = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm(x)
        return self.head(x + self.down(self.act(self.gate(h)) * self.up(h)))


class Bert(nn.Module):
    """An encoder of torch's own layers, with padding."""

    def __init__(self, width=8, vocabulary=11):
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        return self.head(self.layer(self.norm(self.embed(ids)), src_key_padding_mask=ids == 0))


def language_model(kind, dtype=torch.float64):
    """A model and its loss, some targets of which do not count."""
    torch.manual_seed(0)
    model = kind().to(dtype)
    ids = torch.randint(1, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    ids[1, 3:] = 0
    targets = torch.where(ids == 0, -100, ids.roll(-1, 1))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    return model, lambda m: criterion(m(ids).flatten(0, 1), targets.flatten())
