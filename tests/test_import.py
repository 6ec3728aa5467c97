"""What importing the package costs, and that torch.compile knows of it all the same."""
import inspect
import subprocess
import sys

import pytest

from gradops.curvature import hvp

FIRST = "import sys, torch, gradops; assert 'torch._dynamo' not in sys.modules and 'scipy' not in sys.modules"
AFTER = "import sys, torch, torch._dynamo, gradops"
COMPILED = """
x = torch.randn(3, 4)
y = torch.compile(lambda x: gradops.linalg.row_norm(x) + 1, fullgraph=True, backend='eager')(x)
assert torch.equal(y, gradops.linalg.row_norm(x) + 1)
assert not any(type(f).__module__ == 'gradops._compiler' for f in sys.meta_path)
try:
    torch.compile(lambda x: gradops.curvature.hvp(lambda x: (x**3).sum(), x, x)[1], fullgraph=True, backend='eager')(x)
except torch._dynamo.exc.Unsupported as error:
    assert "autograd's own calls" in str(error)
else:
    raise AssertionError('it was compiled')
"""


@pytest.mark.parametrize("imports", [FIRST, AFTER], ids=["before dynamo", "after dynamo"])
def test_compile(imports):
    done = subprocess.run([sys.executable, "-c", imports + COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_disabled_functions_keep_their_signature():
    assert list(inspect.signature(hvp).parameters)[:3] == ["f", "params", "v"] and "Hessian" in hvp.__doc__
