"""What each parameter of a transformer does, from the type of its module and the usual names."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor, nn


class Found(NamedTuple):
    name: str
    param: Tensor
    role: str
    layout: str = "matrix"
    heads: int | None = None
    rows_are_neurons: bool = True  # as read in `layout`


EMBEDDING = {"embed_tokens", "embed_in", "wte", "tok_embeddings", "word_embeddings", "token_embedding", "embedding"}
POSITION = {"wpe", "embed_positions", "position_embedding", "position_embeddings", "pos_embed", "pos_emb"}
HEAD = {"lm_head", "embed_out", "output_projection", "unembed", "unembedding", "output"}
ATTENTION_IN = {"q_proj", "k_proj", "v_proj", "qkv_proj", "wq", "wk", "wv", "wqkv", "qkv", "query", "key", "value",
                "query_key_value", "c_attn", "in_proj_weight"}  # fmt: skip
ATTENTION_OUT = {"o_proj", "out_proj", "wo"}
MLP_IN = {"gate_proj", "up_proj", "w1", "w3", "gate_up_proj", "gate_up_projs", "w13", "c_fc", "fc1", "fc_in",
          "linear1", "dense_h_to_4h"}  # fmt: skip
MLP_FUSED = {"gate_up_proj", "gate_up_projs", "w13"}
MLP_OUT = {"down_proj", "down_projs", "w2", "fc2", "fc_out", "linear2", "dense_4h_to_h"}
NORM = re.compile(r"(^|_)(norm|layernorm|rmsnorm|ln)(_|\d*$)|(^|_)ln(_|\d)|norm$", re.IGNORECASE)


def find_roles(model: nn.Module, per_head: bool) -> list[Found]:
    """One entry per trainable parameter, in the model's order."""
    modules = dict(model.named_modules())
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    found = []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        roles = [_find(alias, p, modules, per_head) for alias in names[id(p)]]
        kinds = {r.role for r in roles}
        tied = "embedding" in kinds and (kinds & {"lm_head", "unknown matrix"})
        found.append(Found(" = ".join(names[id(p)]), p, "tied") if tied else roles[0])
    return found


def _find(name: str, p: Tensor, modules: dict[str, nn.Module], per_head: bool) -> Found:
    path, _, leaf = name.rpartition(".")
    module = modules[path]
    parent = modules[path.rpartition(".")[0]]
    parts = path.split(".")
    # The word that tells: the module's name, or the parameter's own where it has one (experts.gate_up_proj).
    word = (parts[-1] if leaf == "weight" else leaf).lower()
    experts = "experts" in parts
    if word.endswith("bias") or leaf == "bias":
        return Found(name, p, "norm" if _is_norm(module, parts[-1]) else "bias")
    if _is_norm(module, parts[-1]):
        return Found(name, p, "norm")
    if p.ndim < 2:
        return Found(name, p, "vector")
    if word in POSITION:
        return Found(name, p, "position")
    if word in HEAD:
        return Found(name, p, "lm_head")
    if isinstance(module, nn.Embedding) or word in EMBEDDING:
        return Found(name, p, "embedding")
    if p.ndim == 2 and p.shape[0] > 1 and (parts[-1] == "router" or (word == "gate" and hasattr(parent, "experts"))):
        return Found(name, p, "router")
    if isinstance(module, nn.modules.conv._ConvNd):
        return Found(name, p, "convolution" if module.groups == 1 else "unknown tensor", "flat")
    if experts and p.ndim == 3 and word in MLP_IN | MLP_OUT:
        return _stacked_expert(name, p, word, module, modules)
    if p.ndim != 2:
        return Found(name, p, "unknown tensor")
    transposed = type(module).__name__ == "Conv1D"  # GPT-2's linear layer, with its weight as (in, out)
    attention = any("attn" in part or "attention" in part for part in parts)
    if word in ATTENTION_IN or word in ATTENTION_OUT or (attention and word in ("dense", "c_proj", "proj")):
        if not per_head:
            return Found(name, p, "attention")
        rows = (word in ATTENTION_IN) != transposed  # heads are blocks of rows
        return Found(name, p, "attention", "heads" if rows else "heads_in", _heads(name, p.shape[not rows], modules))
    prefix = "experts" if experts else "mlp"
    if word in MLP_FUSED:
        return Found(name, p, f"{prefix}_in", "gate_up")
    if word in MLP_IN:
        return Found(name, p, f"{prefix}_in", "transposed" if transposed else "matrix")
    if word in MLP_OUT or (word == "c_proj" and not attention):
        return Found(name, p, f"{prefix}_out", "matrix" if transposed else "transposed")
    return Found(name, p, "unknown matrix")


def _is_norm(module: nn.Module, word: str) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)) or bool(
        "norm" in type(module).__name__.lower() or NORM.search(word)
    )


def _stacked_expert(name: str, p: Tensor, word: str, module: nn.Module, modules: dict[str, nn.Module]) -> Found:
    """(experts, out, in) as in OLMoE, or (experts, in, out) as in gpt-oss, whose gate and up columns interleave."""
    gpt_oss = any("gptoss" in type(m).__name__.lower().replace("_", "") for m in (modules[""], module))
    in_out = gpt_oss or _is_in_out(p, word, modules)
    if word in MLP_OUT:
        return Found(name, p, "experts_out", "matrix" if in_out else "transposed")
    if word in MLP_FUSED:
        if gpt_oss:
            return Found(name, p, "experts_in", "gate_up_interleaved")
        if in_out:  # two matrices (in, r), side by side; which column belongs to which neuron is not known
            return Found(name, p, "experts_in", "heads_in", 2, rows_are_neurons=False)
        return Found(name, p, "experts_in", "gate_up")
    return Found(name, p, "experts_in", "transposed" if in_out else "matrix")


def _is_in_out(p: Tensor, word: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the model's width, known from its embedding, stands on the side where (in, out) has it."""
    width = next((m.embedding_dim for m in modules.values() if isinstance(m, nn.Embedding)), None)
    model_side, other = (-1, -2) if word in MLP_OUT else (-2, -1)
    return p.shape[model_side] == width and p.shape[other] != width


def _heads(name: str, size: int, modules: dict[str, nn.Module]) -> int:
    """Number of heads along an attention matrix's dimension of this size (of q, k and v together if fused)."""
    path = name.rpartition(".")[0]
    while True:
        path = path.rpartition(".")[0]
        for holder in (modules[path], getattr(modules[path], "config", None)):
            head_dim = getattr(holder, "head_dim", None) or getattr(holder, "head_size", None)
            if not isinstance(head_dim, int):
                count = next(
                    (n for key in ("num_heads", "n_heads", "num_attention_heads", "n_head")
                     if isinstance(n := getattr(holder, key, None), int)), None,
                )  # fmt: skip
                width = next(
                    (n for key in ("hidden_size", "embed_dim", "n_embd", "d_model", "dim")
                     if isinstance(n := getattr(holder, key, None), int)), None,
                )  # fmt: skip
                head_dim = width // count if count and width else None
            if isinstance(head_dim, int) and head_dim > 0 and size % head_dim == 0:
                return size // head_dim
        if not path:
            raise ValueError(
                f"per_head: the number of heads of {name} was not found; its attention module or the module's "
                "config needs head_dim, or num_heads and hidden_size"
            )
