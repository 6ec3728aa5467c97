import inspect

import numpy as np
import pytest

from gradops.ot import smooth_ot_semi_dual


def problem(n=20, m=30, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, 2)), rng.standard_normal((m, 2)) + 1
    M = ((x[:, None] - y) ** 2).sum(-1)
    a, b = rng.random(n) + 0.1, rng.random(m) + 0.1
    return a / a.sum(), b / b.sum(), M / M.max()


def test_same_as_pot():
    pot = pytest.importorskip("ot")
    theirs = pot.smooth.smooth_ot_semi_dual
    signatures = [inspect.signature(f).parameters.values() for f in (smooth_ot_semi_dual, theirs)]
    ours, want = ([(p.name, p.default) for p in parameters] for parameters in signatures)
    assert ours == want
    a, b, M = problem()
    for reg in (1.0, 0.05):
        plan, log = smooth_ot_semi_dual(a, b, M, reg, log=True)
        want, their_log = theirs(a, b, M, reg, log=True)
        # POT stops with the objective right to 1e-9 of what it is, so with the plan to the root of that over reg
        assert log["res"].fun == pytest.approx(their_log["res"].fun, rel=1e-7)
        assert log["res"].fun <= their_log["res"].fun + 1e-12 and log["res"].success
        np.testing.assert_allclose(plan, want, atol=3e-5 / reg**0.5)
        np.testing.assert_allclose(plan.sum(1), a, atol=1e-9)
        known = {"fun", "x", "jac", "nit", "nfev", "success", "status", "message"}
        assert known <= set(log["res"]) and known <= set(their_log["res"])
    wide = smooth_ot_semi_dual(a, b, M, 1.0, "sparsity_constrained", 19)  # more than any column needs: quadratic
    np.testing.assert_allclose(wide, smooth_ot_semi_dual(a, b, M, 1.0), atol=1e-9)


def test_max_nz_like_pot():
    pot = pytest.importorskip("ot")
    a, b, M = problem()
    for max_nz in (1, 2):
        with pytest.warns(UserWarning, match="row marginals are off by"):
            plan, log = smooth_ot_semi_dual(a, b, M, 1.0, "sparsity_constrained", max_nz, log=True)
        _, their_log = pot.smooth.smooth_ot_semi_dual(a, b, M, 1.0, "sparsity_constrained", max_nz, log=True)
        assert log["res"].fun <= their_log["res"].fun + 1e-5 * abs(log["res"].fun)  # minus the objective
        assert ((plan > 0).sum(0) <= max_nz).all()
        np.testing.assert_allclose(plan.sum(0), b, rtol=1e-14)


def test_assignment():
    from scipy.optimize import linear_sum_assignment
    rng = np.random.default_rng(1)
    M, uniform = rng.random((12, 12)), np.full(12, 1 / 12)
    plan = smooth_ot_semi_dual(uniform, uniform, M, 1e-3, "sparsity_constrained", max_nz=1)
    rows, columns = linear_sum_assignment(M)
    assert (np.argwhere(plan > 0) == np.stack([rows, columns], 1)).all()


def test_what_it_does_not_offer(capsys):
    a, b, M = problem(4, 5)
    with pytest.raises(NotImplementedError, match=r"'kl' is not offered here; use gradops.ot.entropic"):
        smooth_ot_semi_dual(a, b, M, 1.0, "kl")
    with pytest.raises(NotImplementedError, match="unknown reg_type 'l1'"):
        smooth_ot_semi_dual(a, b, M, 1.0, "l1")
    with pytest.raises(ValueError, match="max_nz None must be an integer"):
        smooth_ot_semi_dual(a, b, M, 1.0, "sparsity_constrained")
    b[0] = 0
    plan = smooth_ot_semi_dual(a, b / b.sum(), M, 1.0, verbose=True)
    assert not plan[:, 0].any() and np.isfinite(plan).all()
    assert "converged after" in capsys.readouterr().out
