import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.linalg import reference, spectral_solve

OPTIONS = [{}, {"k": 3}, {"rtol": 0.07}, {"filter": "tikhonov", "damping": 0.1}, {"filter": "tikhonov", "k": 2},
           {"filter": "smooth", "rtol": 0.03}, {"power": 0.5}, {"power": 0.0}, {"power": 1.5, "damping": 0.01},
           {"filter": "smooth", "power": 0.5}, {"atol": 0.5}]


def problem(shape, seed=0, smallest=-2.0):
    """G with singular values 1 ... 10^smallest, their vectors, and r."""
    n = shape[-1]
    x = torch.randn(*shape, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(x)[0]
    s = torch.logspace(0, smallest, n, dtype=torch.float64)
    g = (q * s**2) @ q.mT
    return (g + g.mT) / 2, q, s, x.sum(-1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_reference(options):
    g, _, _, r = problem((3, 8))
    w, sigma, rank = spectral_solve(g, r, **options)
    want = reference.spectral_solve(g, r, **options)
    # Eigenvalues down to 1e-4 of the largest, divided by, at float64's 1e-16.
    torch.testing.assert_close(w, want[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sigma, want[1], rtol=1e-10, atol=1e-12)
    assert torch.equal(rank, want[2])


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 7), batch=st.lists(st.integers(0, 3), max_size=2), options=st.sampled_from(OPTIONS),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_any_shape(n, batch, options, dtype, seed):
    g, _, _, r = problem((*batch, n), seed)
    for ours, want in zip(spectral_solve(g, r.to(dtype), **options),
                          reference.spectral_solve(g, r.to(dtype), **options), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)


def test_closed_forms():
    g, q, s, r = problem((6,))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(spectral_solve(g, r)[0], torch.linalg.solve(g, r), **close)
    damped = torch.linalg.solve(g + 0.1 * torch.eye(6, dtype=g.dtype), r)
    torch.testing.assert_close(spectral_solve(g, r, filter="tikhonov", damping=0.1)[0], damped, **close)
    torch.testing.assert_close(spectral_solve(g, r, power=0.5)[0], q @ (s**-1.5 * (q.T @ r)), **close)
    whitened = spectral_solve(g, r, power=0.0)[0]
    torch.testing.assert_close(whitened @ g @ whitened, r @ r, **close)
    w, sigma, rank = spectral_solve(g, r, k=2)
    torch.testing.assert_close(w, q[:, :2] @ (s[:2]**-2 * (q[:, :2].T @ r)), **close)
    torch.testing.assert_close(sigma, s, **close)
    assert rank == 2
    smooth = spectral_solve(g, q[:, 2], filter="smooth", rtol=float(s[2]))[0]
    torch.testing.assert_close(smooth, 0.5 * q[:, 2] / s[2]**2, **close)  # half weight at the cut


@pytest.mark.parametrize("filter", ["hard", "tikhonov", "smooth"])
def test_zero_gives_zero_and_the_bad_stay_alone(filter):
    g, _, _, r = problem((5, 4))
    want = spectral_solve(g, r, filter=filter)
    g[0], g[1, 2, 3], g[2, 0, 0], r[3, 1] = 0, torch.nan, torch.inf, -torch.inf
    w, sigma, rank = spectral_solve(g, r, filter=filter)
    assert (w[0] == 0).all() and (sigma[0] == 0).all() and rank[0] == 0
    assert w[1:4].isnan().all() and sigma[1:4].isnan().all() and (rank[1:4] == -1).all()
    assert all(torch.equal(a[4], b[4]) for a, b in zip((w, sigma, rank), want, strict=True))


def test_rank_deficient():
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, _, rank = spectral_solve(x @ x.T, x[:, 0], rtol=1e-5)
    assert rank == 3
    torch.testing.assert_close(x.T @ w, torch.tensor([1.0, 0, 0], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_inputs_are_kept_and_strides_do_not_matter():
    g, _, _, r = problem((3, 5))
    before = g.clone(), r.clone()
    want = spectral_solve(g, r)
    assert torch.equal(g, before[0]) and torch.equal(r, before[1])
    for a, b in zip(spectral_solve(g.transpose(0, 1).contiguous().transpose(0, 1), r.T.contiguous().T), want,
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    w, _, _ = spectral_solve(g[:1].expand(2, 5, 5), r[:1].expand(2, 5))
    assert torch.equal(w[0], w[1])


def test_bad_input():
    g, r = torch.eye(3), torch.ones(3)
    with pytest.raises(TypeError, match="G must be a torch.Tensor"):
        spectral_solve([[1.0]], r)
    with pytest.raises(TypeError, match="r must be float64"):
        spectral_solve(g, torch.ones(3, dtype=torch.int64))
    for bad, match in [
        ({"G": torch.ones(2, 3)}, "G must be square"), ({"r": torch.ones(1, 3)}, "r must have the shape"),
        ({"k": -1}, "k must be None or"), ({"k": 1.5}, "k must be None or"),
        ({"rtol": 1.0}, r"rtol must be in \[0, 1\)"), ({"rtol": float("nan")}, "rtol must be"),
        ({"atol": -1.0}, "atol must be finite"), ({"damping": -0.1}, "damping must be finite"),
        ({"power": float("inf")}, "power must be finite"), ({"filter": "soft"}, "filter must be one of"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            spectral_solve(**({"G": g, "r": r} | bad))
