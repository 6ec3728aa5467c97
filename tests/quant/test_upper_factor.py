"""The factor of a small block and its inverse, against float64."""
import pytest
import torch

from gradops.quant.upper_factor import MOST_COLUMNS, upper_factor


def definite(batch, n, dtype=torch.float64):
    x = torch.randn(batch, 2 * n + 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return (x.mT @ x / (2 * n + 2)).to(dtype)  # condition number below 100


@pytest.mark.parametrize("n", [0, 1, 2, 17, 100, MOST_COLUMNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_and_inverse(n, dtype):
    h = definite(3, n, dtype)
    factor, inverse, failed = upper_factor(h)
    want = torch.linalg.cholesky(h.double().flip(-2, -1)).flip(-2, -1)
    tolerance = {"rtol": 0, "atol": 200 * torch.finfo(dtype).eps}  # about eps times the condition number
    torch.testing.assert_close(factor.double(), want, **tolerance)
    torch.testing.assert_close(inverse.double(), torch.linalg.inv(want), **tolerance)
    assert not failed.any() and factor.is_contiguous()
    assert torch.equal(factor, factor.triu()) and torch.equal(inverse, inverse.triu())
    again, same, failed = upper_factor(factor, factored=True)
    assert torch.equal(again, factor) and torch.equal(same, inverse) and not failed.any()


def test_views_and_what_is_below_the_diagonal():
    h = definite(2, 60)
    want = upper_factor(h)
    wide = torch.full((2, 60, 200), torch.nan, dtype=h.dtype)
    wide[..., 70:130] = h
    for view in (wide[..., 70:130], h.mT, h.triu() + torch.full_like(h, torch.nan).tril(-1)):
        assert all(torch.equal(a, b) for a, b in zip(upper_factor(view), want, strict=True))
    alone = upper_factor(h[1:])
    assert all(torch.equal(a, b[1:]) for a, b in zip(alone, want, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, -1.0])
def test_an_item_without_a_factor_says_so(bad):
    h = definite(3, 30)
    want = upper_factor(h)
    h[1, 9, 9] = bad
    factor, inverse, failed = upper_factor(h)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(factor[::2], want[0][::2]) and torch.equal(inverse[::2], want[1][::2])


def test_bad_input_is_refused():
    for message, h in {
        "float32 or float64": torch.eye(3).half()[None],
        r"must have shape \(b, n, n\)": torch.eye(3),
        "more than 128": torch.eye(129)[None],
    }.items():
        with pytest.raises(RuntimeError, match=message):
            upper_factor(h)
