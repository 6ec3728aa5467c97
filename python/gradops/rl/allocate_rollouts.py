"""How many rollouts each prompt gets. A plan for the generator, made on the CPU: there is no kernel for a device."""
import torch
from torch import Tensor

from .._checks import check_floating, check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register

_op = register("allocate_rollouts", vmap=False,
               fake=lambda p, budget, low, high, exact: torch.empty_like(p, dtype=torch.int64))


@allow_in_graph
def allocate_rollouts(p: Tensor, budget: int, *, low: int = 2, high: int = 128, method: str = "exact") -> Tensor:
    r"""Shares a budget of rollouts among prompts by their expected success rates.

    .. math:: \max_B \sum_i U(B_i, p_i), \quad \sum_i B_i \le \text{budget}, \quad \text{low} \le B_i \le \text{high},
        \qquad U(B, p) = B\,(1 - p)\,\bigl[1 - (1 - p)^{B-1}\bigr]

    :math:`U` is the expected number of failures in a group of ``B`` rollouts that also holds a success. It is convex in
    :math:`B` below about :math:`2(1-p)/p` and concave above, so giving one rollout after another to the largest gain is
    not optimal; it can fall below 60 % of the optimum.

    Args:
        p: ``(prompts,)`` success rates in [0, 1]; any floating dtype, on the CPU: the plan is made there.
        budget: rollouts to hand out; at least ``low * len(p)``. What would go beyond ``high``, or under "greedy" has
            nothing to gain, is left over.
        low, high: rollouts that every prompt gets at least and at most; ``1 <= low <= high <= 65536``.
        method: "exact" finds an optimum by dynamic programming, in float64, O(len(p) * budget * (high - low)) time and
            4 bytes times len(p) * budget of memory; "greedy" is the paper's marginal gain, O(budget log len(p)), ties
            to the first prompt.

    Returns:
        int64 ``(prompts,)``.

    Raises:
        TypeError: ``p`` is no dense real floating-point tensor.
        ValueError: ``p`` is not 1-dimensional or not on the CPU, or ``low``, ``high``, ``budget`` or ``method`` is bad,
            or a number in ``p`` is outside [0, 1] or NaN.
        RuntimeError: ``p`` asks for a derivative.

    V0, arXiv 2602.03584, eq. 9 and 10 and its greedy allocator (taken from a public review; 2 and 128 are the paper's).

    Example:
        >>> import torch
        >>> from gradops.rl import allocate_rollouts
        >>> p = torch.tensor([0.03, 0.05, 0.5])
        >>> allocate_rollouts(p, 24)
        tensor([ 2, 20,  2])
        >>> allocate_rollouts(p, 24, method="greedy")
        tensor([ 2,  2, 20])
    """
    check_floating(p, "p")
    refuse_derivative("allocate_rollouts", p=p)
    if p.dim() != 1:
        raise ValueError(f"p must have shape (prompts,), got {tuple(p.shape)}")
    if p.device.type != "cpu":
        raise ValueError(f"p must be on the CPU, where the plan is made, got {p.device}")
    check_one_of(method, "method", ("exact", "greedy"))
    if not 1 <= low <= high <= 65536:
        raise ValueError(f"low and high must hold 1 <= low <= high <= 65536, got {low} and {high}")
    if budget < low * p.shape[0]:
        raise ValueError(f"budget must be at least low * len(p) = {low * p.shape[0]}, got {budget}")
    return _op(p.double(), budget, low, high, method == "exact")
