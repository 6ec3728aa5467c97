"""The examples of this family run, in their quick mode."""
import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("script", ["harpg/cartpole.py", "spectrum/transformer.py"])
def test_quick(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", [script, "--quick", "--png", str(tmp_path / "out.png")])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert (tmp_path / "out.png").stat().st_size > 0
