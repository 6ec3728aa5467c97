"""Lanczos, quadrature, Hutchinson and SciPy operators against dense eigenvalues."""
import pytest
import torch

from gradops.curvature import (
    as_linear_operator,
    hutchinson_diag,
    hutchinson_trace,
    lanczos,
    linearize_grad,
    slq_density,
)

from .models import data, dense, flat, loss, parameters, perceptron


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def problem():
    model = perceptron()
    params, f = parameters(model), loss(model, *data())
    return linearize_grad(f, params), dense(f, params)


def matrix(eigenvalues, seed=0):
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.float64))[0]
    return Q @ torch.diag(eigenvalues) @ Q.mT


def test_all_eigenvalues_of_a_model(problem):
    lin, H = problem
    exact = torch.linalg.eigvalsh(H)
    distinct = exact[exact.abs() > 1e-10]
    out = lanczos(lin, len(H), generator=generator(), vectors=True)
    for value in distinct:
        assert (out.eigenvalues - value).abs().min() < 1e-8
    for i in (0, -1):
        q = {name: t[i] for name, t in out.vectors.items()}
        assert (flat(lin(q)) - out.eigenvalues[i] * flat(q)).norm() < 1e-9
        assert abs(flat(q).norm() - 1) < 1e-12


def test_residuals_bound_the_error():
    exact = torch.cat([torch.linspace(0, 1, 190), torch.linspace(2, 9, 10)]).double()
    A = matrix(exact)
    out = lanczos(lambda v: A @ v, 30, like=A[0], generator=generator())
    gap = (out.eigenvalues[:, None] - exact).abs().min(1).values
    assert bool((gap <= out.residuals + 1e-12).all())
    assert out.residuals[-1] < 1e-6 and (out.eigenvalues[1:] >= out.eigenvalues[:-1]).all()
    A = A.float()  # orthogonalised against all of the basis: no ghosts, even far beyond convergence
    out = lanczos(lambda v: A @ v, 120, like=A[0], generator=generator())
    assert (out.eigenvalues[-10:] - exact[-10:]).abs().max() < 1e-5


def test_invariant_space_and_limits():
    d = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 5.0], dtype=torch.float64)
    out = lanczos(lambda v: d * v, 6, like=d, generator=generator())
    torch.testing.assert_close(out.eigenvalues, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    assert out.residuals.max() < 1e-12
    assert lanczos(lambda v: 0 * v, 4, like=d).eigenvalues.tolist() == [0]
    with pytest.raises(ValueError, match="k must be at most the dimension 6, got 7"):
        lanczos(lambda v: v, 7, like=d)
    with pytest.raises(ValueError, match="k must be an integer >= 1, got 0"):
        lanczos(lambda v: v, 0, like=d)
    with pytest.raises(TypeError, match="like must be given"):
        lanczos(lambda v: v, 2)
    with pytest.raises(ValueError, match="the result of matvec must have the shape of like"):
        lanczos(lambda v: v[:2], 2, like=d)
    with pytest.raises(ValueError, match="not finite, at step 0"):
        lanczos(lambda v: v * float("nan"), 2, like=d)


def test_density(problem):
    exact = torch.linspace(-1, 3, 300, dtype=torch.float64)
    A, sigma = matrix(exact), 0.1
    out = slq_density(lambda v: A @ v, 60, 20, like=A[0], sigma=sigma, generator=generator())
    assert abs(torch.trapezoid(out.density, out.grid) - 1) < 1e-3  # what lies beyond 4 sigma, and the grid
    true = torch.distributions.Normal(exact, sigma).log_prob(out.grid[:, None]).exp().mean(1)
    # 20 starts of 300 numbers each; a bump of width sigma holds a tenth of the spectrum.
    assert (out.density - true).abs().max() < 0.15 * true.max()
    again = slq_density(lambda v: A @ v, 60, 20, like=A[0], grid=out.grid, sigma=sigma, generator=generator())
    assert torch.equal(out.density, again.density)
    lin, _H = problem
    out = slq_density(lin, 16, 2, generator=generator())
    assert out.nodes.shape == (2, 16) and abs(out.weights.sum(1) - 1).max() < 1e-12
    assert slq_density(lambda v: v, 8, 1, like=exact).nodes.isfinite().all()
    with pytest.raises(ValueError, match="sigma must be > 0"):
        slq_density(lin, 4, sigma=0.0)
    with pytest.raises(ValueError, match="grid must have one dimension"):
        slq_density(lin, 4, grid=out.grid[None])


def test_hutchinson(problem):
    lin, H = problem
    matvec = lambda v: H @ v
    trace, error = hutchinson_trace(matvec, 400, like=H[0], generator=generator())
    assert abs(trace - H.trace()) < 4 * error and trace.dtype == torch.float64
    off = (H - torch.diag(H.diagonal())).norm()  # variance of z'Hz: twice the squares off the diagonal
    assert 0.7 < error * 20 / (2**0.5 * off) < 1.4
    diag, errors = hutchinson_diag(matvec, 400, like=H[0], generator=generator())
    z = (diag - H.diagonal()) / errors.clamp_min(1e-12)
    assert z.abs().max() < 5 and 0.5 < z.square().mean() < 2
    assert torch.equal(hutchinson_trace(lin, 3, generator=generator()).value,
                       hutchinson_trace(lin, 3, generator=generator()).value)
    assert hutchinson_trace(lin, 1).standard_error.isnan()
    d = torch.arange(5.0)
    exact = hutchinson_diag(lambda v: d * v, 3, like=d)
    assert torch.equal(exact.value, d) and exact.standard_error.abs().max() == 0


def test_operator_of_scipy(problem):
    pytest.importorskip("scipy")
    from scipy.sparse.linalg import eigsh

    lin, H = problem
    A = as_linear_operator(lin)
    assert A.shape == tuple(H.shape) and A.dtype == "float64"
    x = torch.randn(len(H), 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(A @ x.numpy()), H @ x, rtol=0, atol=1e-12)
    top = eigsh(A, k=2, which="LA", return_eigenvectors=False)
    torch.testing.assert_close(torch.as_tensor(top).sort().values, torch.linalg.eigvalsh(H)[-2:], rtol=0, atol=1e-9)


def test_mixed_dtypes():
    d = {"a": torch.arange(1.0, 5.0), "b": torch.arange(5.0, 9.0).bfloat16()}
    matvec = lambda v: {k: d[k] * v[k] for k in d}
    out = lanczos(matvec, 8, like=d, generator=generator())
    assert abs(out.eigenvalues[-1] - 8) < 0.05  # products of bfloat16
    assert hutchinson_trace(matvec, 2, like=d).value == 36
