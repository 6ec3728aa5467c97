"""The function of the same name in POT, on these solvers."""
import warnings
from typing import Any

import numpy as np
import torch

from .solve import solve

Array = np.ndarray[Any, Any]


class _Outcome(dict[str, Any]):
    """What POT returns of scipy.optimize: a dictionary whose entries are attributes too."""

    __getattr__ = dict.__getitem__


def smooth_ot_semi_dual(a: Array, b: Array, M: Array, reg: float, reg_type: str = "l2", max_nz: int | None = None,
                        method: str = "L-BFGS-B", stopThr: float = 1e-9, numItermax: int = 500, verbose: bool = False,
                        log: bool = False) -> Array | tuple[Array, dict[str, Any]]:
    r"""`ot.smooth.smooth_ot_semi_dual` of POT, with the same arguments and results in NumPy arrays.

    One import changes: ``from gradops.ot import smooth_ot_semi_dual``. What differs:

    - ``reg_type`` is ``"l2"`` or ``"sparsity_constrained"``, in POT's other spellings too; not ``"kl"``.
    - ``method`` chooses nothing, as in POT: it is that of `gradops.ot.solve`.
    - ``stopThr`` bounds the error of the row marginals, where POT stops once the objective improves by less; it is
      raised to 1e-12. ``numItermax`` bounds evaluations of the objective.
    - A plan whose row marginals are off by more than 1e-6 comes with a warning that says by how much. POT reports
      success.
    - A column without weight is a column of zeros, and ``max_nz`` at or above ``len(a)`` is no bound.

    Args:
        a, b: ``(ns,)`` and ``(nt,)``, weights; sums must agree to 1e-5.
        M: ``(ns, nt)``, costs; float64 or float32.
        reg: weight of the quadratic term, positive.
        reg_type: ``"l2"`` or ``"sparsity_constrained"``.
        max_nz: the most entries of a column, with ``"sparsity_constrained"``, and only there.
        method: not used.
        stopThr: the error of the marginals that counts as none, relative to the mass.
        numItermax: the most evaluations of the objective.
        verbose: print how it ended.
        log: return also a dictionary with ``alpha``, the row potentials, and ``res``, which has ``fun`` (the negative
            objective, as in POT), ``x``, ``jac``, ``nit``, ``nfev``, ``success``, ``status``, ``message``, and
            ``marginal_err`` and ``gap`` from `gradops.ot.OTResult`.

    Returns:
        The plan ``(ns, nt)``, float64; with ``log`` also the dictionary.

    Raises:
        NotImplementedError: another ``reg_type``, as in POT; for ``"kl"`` it names what to use.
        ValueError: ``max_nz`` is no integer with ``"sparsity_constrained"``; and as `gradops.ot.solve` does.

    Example:
        >>> import numpy as np
        >>> from gradops.ot import smooth_ot_semi_dual
        >>> smooth_ot_semi_dual(np.array([0.5, 0.5]), np.array([0.5, 0.5]), np.array([[0.0, 1.0], [1.0, 0.0]]), 1.0)
        array([[0.5, 0. ],
               [0. , 0.5]])
    """
    kind = reg_type.lower()
    if kind in ("entropic", "negentropy", "kl"):
        raise NotImplementedError(f"reg_type {reg_type!r} is not offered here; use gradops.ot.entropic")
    if kind in ("sparsity_constrained", "sparsity-constrained"):
        if not isinstance(max_nz, int):
            raise ValueError(f"max_nz {max_nz} must be an integer")
    elif kind in ("l2", "squaredl2"):
        max_nz = None
    else:
        raise NotImplementedError(f"unknown reg_type {reg_type!r}; it is 'l2' or 'sparsity_constrained'")
    arrays = (np.ascontiguousarray(t) for t in (M, a, b))
    costs, rows, columns = (torch.from_numpy(t if t.dtype.kind == "f" else t.astype(float)) for t in arrays)
    result = solve(costs, rows, columns, reg=reg, max_nz=max_nz, tol=max(stopThr, 1e-12), max_iter=numItermax)
    error = float(result.marginal_err)
    if not error <= 1e-6:
        warnings.warn(f"row marginals are off by {error:.1e} of the mass ({result.status})", stacklevel=2)
    plan = result.plan.to_dense()
    alpha, calls = result.potentials.alpha.numpy(), int(result.n_iter)
    if verbose:
        print(f"{result.status} after {calls} evaluations: objective {float(result.dual_value):.9g}, "
              f"row marginals off by {error:.1e}, gap {float(result.gap):.1e}")
    if not log:
        return plan.numpy()
    success = result.status == "converged"
    outcome = _Outcome(x=alpha, fun=-float(result.dual_value), jac=(plan.sum(1) - rows).numpy(), nit=calls, nfev=calls,
                       success=success, status=0 if success else 1, message=result.status.upper(), marginal_err=error,
                       gap=float(result.gap))
    return plan.numpy(), {"alpha": alpha, "res": outcome}
