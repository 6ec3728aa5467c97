import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("click", reason="needs gradops[bench]")

from click.testing import CliRunner

from gradops.commands import gradops


def run(*args):
    return CliRunner().invoke(gradops, args)


def shell(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


def test_info_says_what_is_in_use():
    result = run("info")
    assert result.exit_code == 0
    for word in ("gradops", "torch", "CPU kernels", "level", "AMX", "CUDA kernels", "GPU", "NumPy", "JAX"):
        assert word in result.output


def test_info_says_why_a_level_is_in_use():
    result = shell("from gradops.cli import main; import sys; sys.argv[1:] = ['info']; main()", GRADOPS_ISA="v2")
    assert result.returncode == 0 and "level v2, forced by GRADOPS_ISA=v2" in result.stdout


def test_info_fails_on_an_unknown_level():
    result = shell("from gradops.cli import main; import sys; sys.argv[1:] = ['info']; main()", GRADOPS_ISA="v9")
    assert result.returncode == 1 and "GRADOPS_ISA=v9" in result.stdout and "Traceback" not in result.stderr


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    code = f"import sys; sys.modules['{missing}'] = None; from gradops.cli import main; main()"
    result = shell(code)
    assert result.returncode == 1
    says = f"gradops: this command needs {missing}. Install it with: pip install 'gradops[bench]'"
    assert result.stderr.strip() == says


@pytest.mark.parametrize(
    "args, says",
    [
        (["bench", "nonsense"], "no family nonsense; there are"),
        (["bench", "--threads", "0"], "--threads"),
        (["bench", "--device", "tpu"], "--device"),
        (["bench", "linalg", "--quick", "--only", "no such case"], "no case's name contains"),
        (["nonsense"], "No such command"),
        (["quantize", "."], "OUT_DIR"),
        (["quantize", "no such folder", "out"], "no such folder"),
        (["quantize", ".", "out"], "--method gptq needs --calibration"),
        (["quantize", ".", "out", "--bits", "5"], "--bits"),
        (["quantize", ".", ".", "--method", "rtn"], "another directory"),
    ],
)
def test_a_bad_call_is_refused(args, says):
    result = run(*args)
    assert result.exit_code == 2 and says in result.output


def test_bench_writes_a_table_and_json(tmp_path):
    result = run("bench", "linalg", "--quick", "--only", "nuclear_scale", "--json", str(tmp_path / "r.json"))
    assert result.exit_code == 0, result.output
    assert "nuclear_scale" in result.output
    read = json.loads((tmp_path / "r.json").read_text())
    assert {r["family"] for r in read["results"]} == {"linalg"}
    assert all(r["seconds"]["ours"] > 0 for r in read["results"])


def test_quantize_without_its_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "gradops.quant._huggingface", raising=False)
    monkeypatch.delattr("gradops.quant._huggingface", raising=False)
    result = run("quantize", str(tmp_path), str(tmp_path / "out"), "--method", "rtn")
    assert result.exit_code == 1
    assert "this command needs transformers. Install it with: pip install 'gradops[quant]'" in result.output
