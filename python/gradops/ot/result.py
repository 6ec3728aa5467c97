"""What a solver of optimal transport gives back."""
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .dense_plan import DensePlan
from .sparse_plan import SparsePlan

# In the order of csrc/ot/transport.h.
STATUS = ("converged", "iteration_limit", "stalled", "stagnated", "infeasible", "invalid", "overflow")


class Potentials(NamedTuple):
    """Solution of the dual problem; float64. Defined up to adding to one what is taken from the other."""

    alpha: Tensor
    beta: Tensor


@dataclass(frozen=True)
class OTResult:
    r"""The solution of a batch of transport problems, and what is known of its quality. All numbers are float64.

    Attributes:
        plan: `SparsePlan` of shape ``(..., n, m)``. Its columns sum to ``b`` to a few units in the last place, its rows
            to ``a`` up to ``marginal_err``.
        value: ``(...)``, :math:`\langle R, M\rangle + \gamma/2\,\|R\|^2` of the plan rounded onto both marginals:
            no less than the optimum.
        dual_value: ``(...)``, the dual objective: no more than the optimum, up to rounding.
        gap: ``(...)``, ``value - dual_value`` relative to the value with costs counted from their minimum, so that
            neither scaling nor shifting the costs changes it.
        marginal_err: ``(...)``, :math:`\|T\mathbf{1} - a\|_1 / \|a\|_1`.
        ties: ``(...)``, columns in which the relaxed plan has more than ``max_nz`` entries, where the dual has its
            kinks; 0 without ``max_nz``.
        potentials: ``alpha (..., n)``, whose mean is 0, and ``beta (..., m)``.
        n_iter: ``(...)``, int64, evaluations of the dual.
        status_code: ``(...)``, int64, places in ``STATUS``.
    """

    plan: SparsePlan | DensePlan
    value: Tensor
    dual_value: Tensor
    gap: Tensor
    marginal_err: Tensor
    ties: Tensor
    potentials: Potentials
    n_iter: Tensor
    status_code: Tensor

    @property
    def status(self) -> Any:
        """A name per problem, in lists nested like the batch. Waits for the device.

        ``"converged"``: the marginals hold to ``tol``, and ``value - dual_value`` to ``tol / 1000`` of the value with
        costs counted from their minimum, or of a thousandth of their spread times the mass if that is more.
        ``"iteration_limit"``: ``max_iter`` evaluations were not enough; the numbers hold for where it stopped.
        ``"stalled"``: nothing raised the dual any more, by rounding. What was reached by then, ``marginal_err`` and
        ``gap`` say.
        ``"stagnated"``: ``max_nz`` only: the dual stopped rising, and the marginals are off by ``marginal_err``.
        ``"infeasible"``: no plan exists, as rows or columns have more mass than finite costs let them pass on. NaN
        everywhere.
        ``"invalid"``: bad numbers, on CUDA only; the CPU raises. NaN everywhere.
        """
        return _names(self.status_code.tolist())


def _names(code: Any) -> Any:
    return [_names(c) for c in code] if isinstance(code, list) else STATUS[code]
