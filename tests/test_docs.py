"""Every Python block of the README and the docs runs, top to bottom, file by file."""
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks(page, tmp_path, monkeypatch):
    code = BLOCK.findall(page.read_text())
    if any("gradops.jax" in block for block in code):
        pytest.importorskip("gradops.jax", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in code:
        exec(compile(block, str(page), "exec"), scope)
