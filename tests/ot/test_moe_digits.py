"""The example runs, and its routers keep what they promise."""
import importlib.util
import pathlib

import pytest
import torch

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "moe" / "digits.py"
pytest.importorskip("sklearn", reason="pip install scikit-learn")


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_run(digits, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {name: [digits.train(name, 0, 2)] for name in digits.ROUTES}
    finally:
        torch.set_num_threads(threads)
    assert all(run.accuracy > 0.5 for run, in runs.values())
    balance = {name: run.balance for name, (run,) in runs.items()}
    assert balance["transport, experts choose"] == 1 and balance["transport, tokens choose"] < balance["softmax top-2"]
    digits.plot(runs, tmp_path / "figure.png")
    assert digits.summary(runs).row_count == len(runs) and (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("capacity", [None, 12])
def test_routes_share_one_contract(digits, capacity):
    logits = torch.randn(32, digits.EXPERTS, generator=torch.Generator().manual_seed(0)) * 3
    for name, route in digits.ROUTES.items():
        if route is None:
            continue
        indices, weights = route(logits, capacity)
        gates = logits.softmax(-1).mT if "experts" in name else logits.softmax(-1)
        used = indices >= 0
        torch.testing.assert_close(weights[used], gates.gather(-1, indices.clamp(min=0))[used])
        load = used.sum(-1) if "experts" in name else torch.bincount(indices[used], minlength=digits.EXPERTS)
        assert capacity is None or load.max() <= capacity
