import pytest
import torch

from gradops.rl import plackett_luce_logprob, plackett_luce_sample, reference


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("sample", [plackett_luce_sample, reference.plackett_luce_sample])
def test_samples_have_the_probabilities(sample, k):
    scores = torch.tensor([0.3, -1.0, 1.2, -torch.inf])
    n = 20000
    drawn = sample(scores.expand(n, 4), k, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (n, k or 4) and (drawn < 3).all()
    if k is None:
        assert (drawn[:, 3] == -1).all()  # no item is left
    found, counts = drawn.unique(dim=0, return_counts=True)
    p = plackett_luce_logprob(scores, found).exp()
    torch.testing.assert_close(p.sum().item(), 1.0)
    assert (((counts - n * p) ** 2) / (n * p)).sum() < 25  # chi^2, 5 degrees of freedom: 1 in 10000


def test_sample_is_reproducible_and_checks():
    scores = torch.randn(2, 3, 7)
    one, two = (plackett_luce_sample(scores, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (2, 3, 4) and one.dtype == torch.int64
    assert plackett_luce_sample(scores.bfloat16()).sort(-1)[0].equal(torch.arange(7).expand(2, 3, 7))
    for k in (-1, 8):
        with pytest.raises(ValueError, match=f"k must be between 0 and the number of items, 7, got {k}"):
            plackett_luce_sample(scores, k)
    with pytest.raises(TypeError, match="scores must be float64"):
        plackett_luce_sample(torch.ones(3, dtype=torch.int64))
