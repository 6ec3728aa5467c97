import importlib.util
import pathlib

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples" / "ot"


@pytest.mark.parametrize("name, arguments, needs", [
    ("plans_1d", ["--points", "12"], []),
    ("flow_matching", ["--steps", "20", "--size", "16"], []),
    ("colour_transfer", ["--colours", "8", "--stride", "16"], ["sklearn", "PIL"]),
])
def test_example_runs(name, arguments, needs, tmp_path):
    for package in ("matplotlib", "rich", *needs):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    try:
        module.main([*arguments, "--plot", str(tmp_path / "figure.png")])
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "figure.png").stat().st_size > 1000
