import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(autouse=True)
def _small_models_as_large_ones(monkeypatch):
    """The models of these tests are tiny, and take the routes of large ones."""
    from gradops.curvature import _dual

    monkeypatch.setattr(_dual, "SMALL", 0)
