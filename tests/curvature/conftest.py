import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices: threads cost more than they bring, and sums are made in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
