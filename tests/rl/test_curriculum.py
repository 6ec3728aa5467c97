import pytest
import torch

from gradops.rl import curriculum_probs, curriculum_update, reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unseen", ["decay", "keep"])
@pytest.mark.parametrize("samples", [0, 1, 500])
def test_update_matches_reference(dtype, unseen, samples):
    g = torch.Generator().manual_seed(0)
    q = torch.rand(7, generator=g, dtype=dtype)
    categories = torch.randint(0, 5, (samples,), generator=g)  # 5 and 6 are never seen
    advantages = torch.randn(samples, generator=g, dtype=dtype)
    before = q.clone()
    ours = curriculum_update(q, categories, advantages, 0.3, unseen)
    torch.testing.assert_close(ours, reference.curriculum_update(q, categories, advantages, 0.3, unseen))
    assert torch.equal(q, before)
    torch.testing.assert_close(ours[5:], q[5:] * (0.7 if unseen == "decay" else 1))
    shuffle = torch.randperm(samples, generator=g)
    torch.testing.assert_close(curriculum_update(q, categories[shuffle].int(), advantages[shuffle], 0.3, unseen), ours)


def test_nan_stays_in_its_category():
    q = curriculum_update(torch.zeros(3), torch.tensor([0, 1, 1]), torch.tensor([1.0, torch.nan, 2.0]), 0.5)
    assert q[0] == 0.5 and q[1].isnan() and q[2] == 0


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_probs(scale):
    q = scale * torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = curriculum_probs(q, 0.4)
    torch.testing.assert_close(p, reference.curriculum_probs(q, 0.4))
    assert abs(float(p.sum()) - 1) < 1e-12
    if scale == 1:
        assert torch.autograd.gradcheck(lambda q: curriculum_probs(q, 0.4), (q.requires_grad_(),))


def test_bad_input():
    q, c, a = torch.zeros(3), torch.tensor([0, 1]), torch.ones(2)
    for args, error, message in [
        ((q.long(), c, a, 0.5), TypeError, "q must be float64"),
        ((q[None], c, a, 0.5), ValueError, r"q must have shape \(categories,\)"),
        ((q, a, a, 0.5), TypeError, "categories must be int32 or int64"),
        ((q, c, a[:1], 0.5), ValueError, "advantages must have the shape of categories"),
        ((q, c + 2, a, 0.5), ValueError, r"categories must be in \[0, 3\), got 3"),
        ((q, c - 1, a, 0.5), ValueError, r"categories must be in \[0, 3\), got -1"),
        ((q, c, a, 1.5), ValueError, r"alpha must be in \[0, 1\]"),
        ((q, c, a, 0.5, "drop"), ValueError, "unseen must be one of"),
        ((q, c, a.clone().requires_grad_(), 0.5), RuntimeError, "advantages asks for a derivative"),
    ]:
        with pytest.raises(error, match=message):
            curriculum_update(*args)
    with pytest.raises(ValueError, match="tau must be above 0"):
        curriculum_probs(q, 0.0)
    with pytest.raises(ValueError, match=r"q must have shape \(categories,\)"):
        curriculum_probs(q[None], 1.0)
