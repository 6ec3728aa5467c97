"""Which update symmetry_param_groups chooses for the parameters of small transformers."""

import pytest
import torch
from torch import nn

from gradops.optim import SymmetryOptimizer, symmetry_param_groups

from . import models


def choice(model, **kwargs):
    """name -> (role, update, layout, heads)"""
    groups = symmetry_param_groups(model, verbose=False, **kwargs)
    return {
        name: (g["role"], g["update"], g.get("layout", "matrix"), g.get("heads"))
        for g in groups
        for name, _ in g["params"]
    }


def test_llama():
    got = choice(models.Llama())
    block = "layers.1."
    assert got["embed_tokens.weight"] == ("embedding", "row_norm", "matrix", None)
    assert got["lm_head.weight"] == ("lm_head", "row_norm", "matrix", None)
    for name in "qkvo":
        assert got[f"{block}self_attn.{name}_proj.weight"] == ("attention", "muon", "matrix", None)
    assert got[f"{block}self_attn.q_proj.bias"][:2] == ("bias", "adamw")
    assert got[f"{block}mlp.gate_proj.weight"] == ("mlp_in", "hybrid", "matrix", None)
    assert got[f"{block}mlp.up_proj.weight"] == ("mlp_in", "hybrid", "matrix", None)
    assert got[f"{block}mlp.down_proj.weight"] == ("mlp_out", "hybrid", "transposed", None)
    assert got[f"{block}input_layernorm.weight"][:2] == got["norm.weight"][:2] == ("norm", "adamw")
    assert len(got) == len(list(models.Llama().parameters()))


def test_heads():
    got = choice(models.Llama(), per_head=True)
    attention = "layers.0.self_attn."
    assert got[f"{attention}q_proj.weight"][2:] == ("heads", 4)
    assert got[f"{attention}k_proj.weight"][2:] == ("heads", 2)
    assert got[f"{attention}o_proj.weight"][2:] == ("heads_in", 4)
    got = choice(models.NeoX(), per_head=True)
    assert got["attention.query_key_value.weight"][2:] == ("heads", 12)
    assert got["attention.dense.weight"][2:] == ("heads_in", 4)
    got = choice(models.Gpt2(), per_head=True)
    assert got["h.attn.c_attn.weight"][2:] == ("heads_in", 12)
    assert got["h.attn.c_proj.weight"][2:] == ("heads", 4)
    model = models.NeoX()
    del model.attention.head_size
    with pytest.raises(ValueError, match=r"heads of attention\.query_key_value\.weight was not found"):
        choice(model, per_head=True)


def test_moe_layouts():
    olmoe = choice(models.Llama(models.Moe))
    assert olmoe["layers.0.mlp.gate.weight"][:2] == ("router", "left_polar")
    assert olmoe["layers.0.mlp.experts.gate_up_proj"] == ("experts_in", "hybrid", "gate_up", None)
    assert olmoe["layers.0.mlp.experts.down_proj"] == ("experts_out", "hybrid", "transposed", None)
    oss = choice(models.Llama(models.GptOssMoe))
    assert oss["layers.0.mlp.router.weight"][:2] == ("router", "left_polar")
    assert oss["layers.0.mlp.router.bias"][:2] == ("bias", "adamw")
    assert oss["layers.0.mlp.experts.gate_up_proj"] == ("experts_in", "hybrid", "gate_up_interleaved", None)
    assert oss["layers.0.mlp.experts.gate_up_proj_bias"][:2] == ("bias", "adamw")
    assert oss["layers.0.mlp.experts.down_proj"] == ("experts_out", "hybrid", "matrix", None)
    mixtral = choice(models.Llama(models.MixtralMoe))
    assert mixtral["layers.0.mlp.gate.weight"][:2] == ("router", "left_polar")
    assert mixtral["layers.0.mlp.experts.3.w1.weight"] == ("experts_in", "hybrid", "matrix", None)
    assert mixtral["layers.0.mlp.experts.3.w2.weight"] == ("experts_out", "hybrid", "transposed", None)


def test_experts_of_unknown_column_order_are_two_matrices():
    class In(models.GptOssExperts):
        pass

    In.__name__ = "Experts"
    model = models.Llama(models.GptOssMoe)
    for layer in model.layers:
        layer.mlp.experts.__class__ = In
    got = choice(model)
    assert got["layers.0.mlp.experts.gate_up_proj"] == ("experts_in", "muon", "heads_in", 2)
    assert got["layers.0.mlp.experts.down_proj"] == ("experts_out", "hybrid", "matrix", None)


def test_gpt2_and_neox():
    got = choice(models.Gpt2())
    assert got["wte.weight"][0] == "embedding"
    assert got["wpe.weight"][:2] == ("position", "adamw")
    assert got["h.mlp.c_fc.weight"] == ("mlp_in", "hybrid", "transposed", None)
    assert got["h.mlp.c_proj.weight"] == ("mlp_out", "hybrid", "matrix", None)
    assert got["h.attn.c_proj.weight"][0] == "attention"
    assert got["ln_f.weight"][0] == "norm"
    got = choice(models.NeoX())
    assert got["embed_in.weight"][0] == "embedding" and got["embed_out.weight"][0] == "lm_head"
    assert got["mlp.dense_h_to_4h.weight"][0] == "mlp_in" and got["mlp.dense_4h_to_h.weight"][0] == "mlp_out"
    assert got["attention.dense.weight"][0] == got["attention.query_key_value.weight"][0] == "attention"


def test_tied(capsys):
    groups = symmetry_param_groups(models.Llama(tied=True))
    (tied,) = [g for g in groups if g["role"] == "tied"]
    assert tied["update"] == "row_norm" and tied["center"]
    assert [name for name, _ in tied["params"]] == ["embed_tokens.weight = lm_head.weight"]
    assert "embed_tokens.weight = lm_head.weight" in capsys.readouterr().out


def test_unknown_frozen_and_convolutions(capsys):
    model = nn.Module()
    model.mystery = nn.Parameter(torch.zeros(4, 4))
    model.cube = nn.Parameter(torch.zeros(2, 2, 2))
    model.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    model.stem, model.depthwise = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=8)
    got = {k: v[:3] for k, v in choice(model).items()}
    assert got == {
        "mystery": ("unknown matrix", "muon", "matrix"),
        "cube": ("unknown tensor", "adamw", "matrix"),
        "stem.weight": ("convolution", "muon", "flat"),
        "stem.bias": ("bias", "adamw", "matrix"),
        "depthwise.weight": ("unknown tensor", "adamw", "matrix"),
        "depthwise.bias": ("bias", "adamw", "matrix"),
    }
    symmetry_param_groups(model)
    table = capsys.readouterr().out
    assert "unknown matrix" in table and "mystery" in table and "cube" in table and "frozen" not in table


def test_overrides():
    model = models.Llama()
    groups = symmetry_param_groups(
        model, verbose=False,
        overrides={"lm_head": {"lr": 5e-3}, "layers.0.*q_proj.weight": "adamw",
                   "embedding": {"update": "right_polar", "alpha": 0.5}},
    )  # fmt: skip
    by_name = {name: g for g in groups for name, _ in g["params"]}
    assert by_name["lm_head.weight"]["lr"] == 5e-3 and by_name["lm_head.weight"]["center"]
    assert by_name["layers.0.self_attn.q_proj.weight"]["update"] == "adamw"
    assert by_name["layers.0.self_attn.q_proj.weight"]["lr"] == 3e-4
    assert by_name["layers.1.self_attn.q_proj.weight"]["update"] == "muon"
    assert (by_name["embed_tokens.weight"]["update"], by_name["embed_tokens.weight"]["alpha"]) == ("right_polar", 0.5)
    SymmetryOptimizer(groups)
    with pytest.raises(ValueError, match=r"'no\.such\.name' match neither"):
        symmetry_param_groups(model, overrides={"no.such.name": "adamw"})
    with pytest.raises(ValueError, match="update must be one of"):
        symmetry_param_groups(model, overrides={"lm_head": "adam"})


@pytest.mark.parametrize("mlp, tied, per_head", [(models.SwiGLU, False, True), (models.Moe, True, False)])
def test_training_and_checkpoint(mlp, tied, per_head):
    torch.manual_seed(0)
    model = models.Llama(mlp, tied)
    opt = SymmetryOptimizer(symmetry_param_groups(model, lr=0.02, per_head=per_head, verbose=False))
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=60)
    tokens = torch.randint(models.VOCABULARY, (8, 12)).repeat(1, 2)  # the second half can be copied or memorised

    def train(opt, steps):
        losses = []
        for _ in range(steps):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            opt.zero_grad()
            loss.backward()
            opt.step()
            scheduler.step()
            losses.append(loss.item())
        return losses

    losses = train(opt, 60)
    assert losses[-1] < 0.5 * losses[0]  # the random first halves have to be memorised
    weights, saved = {k: v.clone() for k, v in model.state_dict().items()}, opt.state_dict()
    other = SymmetryOptimizer(symmetry_param_groups(model, lr=1.0, per_head=per_head, verbose=False))
    other.load_state_dict(saved)
    expected = train(opt, 3)
    model.load_state_dict(weights)
    assert train(other, 3) == expected
