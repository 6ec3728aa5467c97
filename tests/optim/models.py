"""Small transformers with the parameter names of Llama, OLMoE, Mixtral, gpt-oss, GPT-2 and GPT-NeoX."""

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, HIDDEN, HEADS, EXPERTS = 32, 16, 24, 4, 4


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=True)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """OLMoE: (experts, out, in), gate and up as halves."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.1 * torch.randn(EXPERTS, 2 * HIDDEN, WIDTH))
        self.down_proj = nn.Parameter(0.1 * torch.randn(EXPERTS, WIDTH, HIDDEN))


class GptOssExperts(nn.Module):
    """gpt-oss: (experts, in, out), gate and up interleaved, biases of two dimensions."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.1 * torch.randn(EXPERTS, WIDTH, 2 * HIDDEN))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * HIDDEN))
        self.down_proj = nn.Parameter(0.1 * torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.down_proj_bias = nn.Parameter(torch.zeros(EXPERTS, WIDTH))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(EXPERTS, WIDTH))
        self.bias = nn.Parameter(torch.zeros(EXPERTS))


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = Experts()

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        gate, up = torch.einsum("bsd,ehd->bseh", x, self.experts.gate_up_proj).chunk(2, -1)
        return torch.einsum("bseh,edh,bse->bsd", F.silu(gate) * up, self.experts.down_proj, weights)


class GptOssMoe(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router()
        self.experts = GptOssExperts()


class MixtralExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)


class MixtralMoe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MixtralExpert() for _ in range(EXPERTS))


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.self_attn, self.mlp = Attention(), mlp()

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, mlp=SwiGLU, tied=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(mlp) for _ in range(2))
        self.norm = RMSNorm()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is (in, out)."""

    def __init__(self, out, inner):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, out)), nn.Parameter(torch.zeros(out))


class Gpt2(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(8, WIDTH)
        self.ln_f = nn.LayerNorm(WIDTH)
        self.h = nn.ModuleDict({"attn": nn.Module(), "mlp": nn.Module()})
        self.h.attn.num_heads, self.h.attn.embed_dim = HEADS, WIDTH
        self.h.attn.c_attn, self.h.attn.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.h.mlp.c_fc, self.h.mlp.c_proj = Conv1D(4 * WIDTH, WIDTH), Conv1D(WIDTH, 4 * WIDTH)


class NeoX(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_in = nn.Embedding(VOCABULARY, WIDTH)
        self.attention, self.mlp = nn.Module(), nn.Module()
        self.attention.head_size = WIDTH // HEADS
        self.attention.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention.dense = nn.Linear(WIDTH, WIDTH)
        self.mlp.dense_h_to_4h, self.mlp.dense_4h_to_h = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.embed_out = nn.Linear(WIDTH, VOCABULARY, bias=False)
