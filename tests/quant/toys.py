"""Small models in plain torch, shaped like the ones that people quantise."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, WORDS = 32, 2, 50


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Every token goes to the two experts that the router likes best. The last expert is liked by none."""

    def __init__(self, count: int = 4):
        super().__init__()
        self.gate = nn.Linear(WIDTH, count, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        likes = self.gate(tokens)
        likes[:, -1] = -torch.inf
        share, chosen = likes.softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, place = (chosen == i).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, expert(tokens[token]) * share[token, place, None])
        return out.view_as(x)


class LlamaBlock(nn.Module):
    def __init__(self, mlp=Gated):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.self_attn, self.mlp = Attention(), mlp()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + scale * self.self_attn(self.norm1(x), causal=True)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """Blocks get an argument that differs from block to block, and the head is tied to the embedding."""

    def __init__(self, mlp=Gated, blocks: int = 2):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(LlamaBlock(mlp) for _ in range(blocks))
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, scale=1.0 / (i + 1))
        return self.lm_head(x)


class BertBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.down(F.gelu(self.up(x)))), x.mean()  # a tuple, as many encoders return


class Bert(nn.Module):
    def __init__(self, blocks: int = 2):
        super().__init__()
        self.embed, self.pooler = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer = nn.ModuleList(BertBlock() for _ in range(blocks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layer:
            x = layer(x, attention_mask[:, None, None].bool())[0]
        weight = attention_mask[..., None].to(x.dtype)
        return self.pooler((x * weight).sum(1) / weight.sum(1))


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(seed))


def make(model: type[nn.Module], *args, seed: int = 0, **options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(*args, **options).eval()
