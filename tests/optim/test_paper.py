"""PolarGrad against the figures of its paper's quadratic problem, made with the authors' public code."""

import importlib.util
from pathlib import Path

import pytest

from gradops.optim import PolarGrad

_spec = importlib.util.spec_from_file_location(
    "polargrad_quadratic", Path(__file__).parents[2] / "examples" / "polargrad_quadratic.py"
)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


def test_optimum():
    assert example.problem()[3] == pytest.approx(99685.9, rel=1e-6)


@pytest.mark.parametrize(
    "make, expected",
    [
        (
            lambda p: PolarGrad(p, lr=4e-8, momentum=0.0, method=example.two_step_qdwh),
            {0: 2.14204e9, 50: 34539, 100: 7708.4, 200: 1851.8},
        ),
        (lambda p: PolarGrad(p, lr=3e-8, momentum=0.0, method="qdwh"), {50: 25498, 100: 4078.7}),
        (
            lambda p: PolarGrad(p, lr=4e-8, momentum=0.9, method=example.two_step_qdwh),
            {50: 5.914e6, 100: 41532, 200: 3470.5},
        ),
    ],
    ids=["inexact", "exact", "momentum"],
)
def test_quadratic(make, expected):
    gaps = example.run(make, checkpoints=tuple(expected))
    assert gaps == pytest.approx(expected, rel=0.01)
