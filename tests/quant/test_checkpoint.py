"""What is saved, read by a reader that knows nothing of ours, and loaded again."""
import json
import struct

import numpy as np
import pytest
import torch
from torch import nn

from gradops.quant import QuantizeConfig, QuantizedLinear, load_quantized, quantize_model, save_quantized

from . import toys

pytest.importorskip("safetensors", reason="needs gradops[quant]: safetensors")

BATCHES = [toys.ids(4, 12, seed=i) for i in range(2)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def quantised(model=None, **options):
    model = toys.make(toys.Llama) if model is None else model
    config = QuantizeConfig(**{"group_size": 16} | options)
    quantize_model(model, BATCHES, config, progress=False)
    return model


def read_safetensors(file):
    """The format: a length, a header in JSON, and the bytes."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    kinds = {"I32": np.int32, "F16": np.float16, "F32": np.float32}
    found = {}
    for name, facts in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + x for x in facts["data_offsets"])
            found[name] = np.frombuffer(raw[begin:end], kinds[facts["dtype"]]).reshape(facts["shape"])
    return found


def numbers(words, bits, count):
    """Numbers of some bits each from int32 words (k, n), down the columns, lowest bits first."""
    stream = np.unpackbits(np.ascontiguousarray(words.astype("<u4").T).view(np.uint8), axis=-1, bitorder="little")
    return stream[:, : count * bits].reshape(-1, count, bits) @ (1 << np.arange(bits))


def dequantised(tensors, name, config):
    """Weight (out, in) of a layer, from the public description of the format."""
    qweight, qzeros, scales, g_idx = (tensors[f"{name}.{x}"] for x in ("qweight", "qzeros", "scales", "g_idx"))
    codes = numbers(qweight, config["bits"], len(g_idx))
    zeros = numbers(qzeros.T, config["bits"], scales.shape[1]) + (config["checkpoint_format"] == "gptq")
    scales = scales.astype(np.float32)
    return scales[g_idx].T * (codes - zeros[g_idx].T).astype(np.float32)


@pytest.mark.parametrize("options", [
    {}, {"bits": 2}, {"bits": 3, "desc_act": True}, {"bits": 8, "group_size": -1}, {"checkpoint_format": "gptq_v2"},
    {"sym": False, "checkpoint_format": "gptq_v2", "bits": 3}, {"act_group_aware": True}, {"method": "rtn"},
    {"desc_act": True, "static_groups": True},
], ids=str)  # fmt: skip
def test_an_independent_reader_gets_our_weights(tmp_path, options):
    model = quantised(**options)
    save_quantized(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "quantize_config.json").read_text())
    assert config["quant_method"] == "gptq" and config["bits"] == options.get("bits", 4)
    assert config["group_size"] == options.get("group_size", 16) and config["sym"] == options.get("sym", True)
    assert config["desc_act"] == (options.get("desc_act", False) and not options.get("static_groups", False))
    tensors = read_safetensors(tmp_path / "model.safetensors")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        np.testing.assert_array_equal(dequantised(tensors, name, config), layer.dequantize().numpy())
    np.testing.assert_array_equal(tensors["embed.weight"], model.embed.weight.numpy())
    assert "lm_head.weight" not in tensors  # tied


@pytest.mark.parametrize("options", [{}, {"bits": 3, "desc_act": True}, {"sym": False, "checkpoint_format": "gptq_v2"}],
                         ids=str)  # fmt: skip
def test_loaded_again_it_is_the_same(tmp_path, options):
    model = quantised(**options)
    save_quantized(model, tmp_path, max_shard_bytes=4000)
    assert not (tmp_path / "model.safetensors").exists() and len(list(tmp_path.glob("model-*.safetensors"))) > 3
    other = toys.make(toys.Llama, seed=5)
    again = load_quantized(tmp_path, other)
    assert again is other and again.lm_head.weight is again.embed.weight
    assert torch.equal(again(BATCHES[0]), model(BATCHES[0]))
    save_quantized(again, tmp_path)  # one file again; those of before are gone
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "quantize_config.json", "model.safetensors"}
    assert torch.equal(load_quantized(tmp_path, toys.make(toys.Llama))(BATCHES[0]), model(BATCHES[0]))


def test_biases_and_dtypes_come_back(tmp_path):
    batch = {"input_ids": toys.ids(4, 12), "attention_mask": torch.ones(4, 12).long()}
    model = toys.make(toys.Bert).bfloat16()
    quantize_model(model, [batch], QuantizeConfig(group_size=32), progress=False)
    save_quantized(model, tmp_path)
    again = load_quantized(tmp_path, toys.make(toys.Bert, seed=3).bfloat16())
    assert again.layer[0].up.bias.dtype == torch.bfloat16
    assert torch.equal(again(**batch), model(**batch))


def test_layers_in_full_precision_are_listed(tmp_path):
    save_quantized(quantised(skip=("*.mlp.*",)), tmp_path)
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    assert len(config["dynamic"]) == 6 and config["dynamic"][r"-:^layers\.0\.mlp\.up_proj$"] == {}
    again = load_quantized(tmp_path, toys.make(toys.Llama))
    assert type(again.layers[0].mlp.up_proj) is nn.Linear


def test_what_cannot_be_saved_or_loaded(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        save_quantized(toys.make(toys.Llama), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model = quantised()
    mixed = quantised(bits=8)
    mixed.layers[0] = model.layers[0]
    with pytest.raises(ValueError, match="of one kind"):
        save_quantized(mixed, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_quantized(tmp_path, toys.make(toys.Llama))
    save_quantized(model, tmp_path)
    with pytest.raises(ValueError, match=r"quantised layer layers\.0\.\S+, the model has no Linear"):
        load_quantized(tmp_path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"the checkpoint lacks: \['layers\.2"):
        load_quantized(tmp_path, toys.make(toys.Llama, blocks=3))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be 'gptq', got 'awq'"):
        load_quantized(tmp_path, toys.make(toys.Llama))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptqmodel_gets_our_weights(tmp_path, bits, form):
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed").TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Linear(128, 96))
    config = QuantizeConfig(bits=bits, group_size=32, desc_act=True, checkpoint_format=form)
    quantize_model(model, [torch.randn(512, 128) @ torch.randn(128, 128)], config, progress=False)
    save_quantized(model, tmp_path)
    theirs = linear(bits=bits, group_size=32, sym=True, desc_act=True, in_features=128, out_features=96, bias=True)
    tensors = load_file(tmp_path / "model.safetensors")
    theirs.load_state_dict({name.removeprefix("0."): x for name, x in tensors.items()})
    if form == "gptq":
        convert_gptq_v1_to_v2_format_module(theirs, bits, torch.int32)
    theirs.scales = theirs.scales.float()  # otherwise they multiply in float16
    theirs.post_init()
    assert torch.equal(theirs.dequantize_weight().T, model[0].dequantize())
