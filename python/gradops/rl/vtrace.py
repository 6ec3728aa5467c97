"""V-trace targets and advantages."""
from torch import Tensor

from .._compiler import allow_in_graph
from .._op import refuse_derivative
from . import scan


@allow_in_graph
def vtrace(rewards: Tensor, values: Tensor, log_ratios: Tensor, *, gamma: float, lam: float = 1.0,
           rho_clip: float = 1.0, c_clip: float = 1.0, terminated: Tensor | None = None,
           truncated: Tensor | None = None, next_values: Tensor | None = None, last_values: Tensor | None = None,
           mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""V-trace: off-policy advantages and value targets, with truncated importance ratios.

    .. math::

        \delta_t &= r_t + \gamma n_t - V_t, \qquad w_t = e^{\text{log\_ratios}_t}, \quad
            \rho_t = \min(\bar\rho, w_t), \quad c_t = \lambda \min(\bar c, w_t) \\
        y_t &= \rho_t \delta_t + \gamma c_t\, y_{t+1}, \qquad R_t = V_t + y_t, \qquad
            A_t = \rho_t\,(\delta_t + \gamma\, y_{t+1})

    :math:`n_t` as in :func:`gae`; :math:`y_{t+1}` counts as 0 where token ``t`` is terminated or truncated, and after a
    row. :math:`A_t = \rho_t (r_t + \gamma R_{t+1} - V_t)`, the paper's form, where :math:`n_t` is the next token's
    value.

    Args:
        rewards: ``(..., T)``, or packed ``(N,)`` with ``cu_seqlens``; float64, float32, bfloat16 or float16.
        values: like ``rewards``: :math:`V_t`, the value of the state before each token.
        log_ratios: like ``rewards``: log pi - log mu of each token, target policy over the one that acted. A constant:
            one that asks for a derivative is refused.
        gamma: the discount per token, in [0, 1].
        lam: in [0, 1]; 1 in the paper, other values in its Remark 2.
        rho_clip, c_clip: :math:`\bar\rho` and :math:`\bar c`, both 1 in the paper's experiments; ``math.inf`` for none.
        terminated, truncated, next_values, last_values, mask, cu_seqlens: as in :func:`gae`.

    Returns:
        ``(advantages, returns)`` like ``rewards``; float32 for 16-bit input, the promoted dtype of mixed input.

    Raises:
        TypeError: as :func:`gae`.
        ValueError: as :func:`gae`, or a clip is negative.
        RuntimeError: ``log_ratios`` asks for a derivative.

    Espeholt et al., arXiv 1802.01561, eq. 1 and section 4.2 (:math:`\rho` clips the advantage as well; some libraries
    have a threshold of its own there). torchrl's ``vtrace_advantage_estimate`` with ``lam = 1``.
    Linear in rewards and values: differentiable in them to any order. O(tokens); the exponentials are a pass of torch.

    Example:
        >>> import torch
        >>> from gradops.rl import vtrace
        >>> advantages, returns = vtrace(torch.tensor([0.0, 1.0]), torch.zeros(2), torch.tensor([0.5, 1.0]).log(),
        ...                              gamma=1.0)
        >>> advantages, returns
        (tensor([0.5000, 1.0000]), tensor([0.5000, 1.0000]))
    """
    refuse_derivative("vtrace", log_ratios=log_ratios if isinstance(log_ratios, Tensor) else None)
    for name, clip in (("rho_clip", rho_clip), ("c_clip", c_clip)):
        if not clip >= 0:
            raise ValueError(f"{name} must not be negative, got {clip}")
    if log_ratios is None:
        raise TypeError("log_ratios must be a torch.Tensor, got None")
    inputs, steps = scan.check(rewards, values, next_values, last_values, terminated, truncated, mask, cu_seqlens,
                               gamma, lam, log_ratios, (float(rho_clip), float(c_clip)))
    return scan.advantages(inputs, steps)
