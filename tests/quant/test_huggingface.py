"""`gradops quantize` on models of `transformers`, from directories made here."""
import json

import pytest
import torch

pytest.importorskip("safetensors", reason="needs gradops[quant]: safetensors")
pytest.importorskip("transformers", reason="needs gradops[quant]: transformers")
pytest.importorskip("click", reason="needs gradops[cli]")

import transformers
from click.testing import CliRunner

from gradops.commands import gradops
from gradops.quant import QuantizedLinear, load_quantized

WORDS = "the kernel reads one row and writes it back before another thread asks what no cache holds"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}


@pytest.fixture
def run(tmp_path):
    text = tmp_path / "text.txt"
    words = WORDS.split()
    order = torch.randint(len(words), (2000,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(words[i] for i in order))

    def call(*args):
        fixed = ["--calibration", str(text), "--length", "16", "--group-size", "16"]
        return CliRunner().invoke(gradops, ["quantize", str(tmp_path / "in"), str(tmp_path / "out"), *args, *fixed])

    return call


def save(folder, model):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **options))


@pytest.mark.parametrize("make, layers", [
    (bert, 12), (llama, 14), (lambda: llama(tie_word_embeddings=True).half(), 14),
    (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_head=2, n_layer=2, vocab_size=40, n_positions=64)), 8),
], ids=["bert", "llama", "llama-tied-half", "gpt2"])  # fmt: skip
def test_a_directory_becomes_a_checkpoint(tmp_path, run, make, layers):
    torch.manual_seed(0)
    model = make().eval()
    save(tmp_path / "in", model)
    result = run()
    assert result.exit_code == 0, result.output
    again = load_quantized(tmp_path / "out")
    assert type(again) is type(model) and next(again.parameters()).dtype == next(model.parameters()).dtype
    found = [name for name, m in again.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(found) == layers
    ids = {"input_ids": torch.arange(2, 18).repeat(2, 1)}
    with torch.no_grad():
        exact, ours = model(**ids)[0].float(), again(**ids)[0].float()
    assert ((ours - exact).norm() / exact.norm()) < 0.2
    assert (tmp_path / "out" / "tokenizer.json").exists()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    settings = transformers.GPTQConfig.from_dict(config.quantization_config)
    assert (settings.bits, settings.group_size, settings.sym, settings.format) == (4, 16, True, "gptq")
    assert settings.quant_method == "gptq"
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config.quantization_config


def test_options_reach_the_checkpoint(tmp_path, run):
    save(tmp_path / "in", bert())
    result = run("--bits", "3", "--method", "foem+gptaq", "--desc-act", "--asym", "--skip", "*.query",
                 "--resume", str(tmp_path / "parts"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "left alone: encoder.layer.0.attention.self.query: skip='*.query'" in result.output
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    expected = {"bits": 3, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"}
    assert expected.items() <= config.items()
    assert len(list((tmp_path / "parts").glob("*.pt"))) == 10


def test_what_the_command_refuses(tmp_path, run):
    save(tmp_path / "in", llama())
    (tmp_path / "text.txt").write_text("the kernel")
    result = run()
    assert result.exit_code == 1 and "calibration text must have at least 16 tokens, got 2" in result.output
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"architectures": ["Strange"]}))
    result = run("--method", "rtn")
    assert result.exit_code == 1 and "must name a class of transformers" in result.output
