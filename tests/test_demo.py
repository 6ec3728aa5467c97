"""The demo runs: a few steps of each optimizer, and its kernel table finds its cases."""
import pathlib
import runpy
import sys

import pytest
from gradops.bench import harness

DEMO = pathlib.Path(__file__).resolve().parents[1] / "examples" / "demo.py"


def test_a_few_steps(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    seen = []

    def names(cases, floor):  # timing them all takes a minute
        seen.extend(case.name for case in cases)
        return []

    monkeypatch.setattr(harness, "run", names)
    monkeypatch.setattr(sys, "argv", [str(DEMO), "--steps", "4", "--png", str(tmp_path / "demo.png")])
    runpy.run_path(str(DEMO), run_name="__main__")
    assert (tmp_path / "demo.png").stat().st_size > 0
    assert {name.split()[0] for name in seen} == {"newton_schulz", "polar", "row_norm"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("AdamW", "torch.optim.Muon", "gradops Muon", "gradops PolarGrad"))
