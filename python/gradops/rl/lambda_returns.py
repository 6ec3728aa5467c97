"""TD(lambda) returns."""
from torch import Tensor

from .._compiler import allow_in_graph
from . import scan


@allow_in_graph
def lambda_returns(rewards: Tensor, values: Tensor | None = None, *, gamma: float, lam: float,
                   terminated: Tensor | None = None, truncated: Tensor | None = None,
                   next_values: Tensor | None = None, last_values: Tensor | None = None, mask: Tensor | None = None,
                   cu_seqlens: Tensor | None = None) -> Tensor:
    r"""Mixes the n-step returns of each row.

    .. math:: G_t = r_t + \gamma \begin{cases} 0 & \text{terminated}_t \\ n_t & \text{truncated}_t \\
        (1 - \lambda)\, n_t + \lambda\, G_{t+1} & \text{else} \end{cases}

    :math:`n_t` is the value of what follows token ``t``: ``next_values[t]``, or without them ``values`` of the next
    token and, after the last one, ``last_values``. A row's walk starts from :math:`G_T = n_{T-1}`.

    Args:
        rewards: ``(..., T)``, or packed ``(N,)`` with ``cu_seqlens``; float64, float32, bfloat16 or float16.
        values: like ``rewards``: the value of each token's own state. Give these or ``next_values``.
        gamma: the discount per token, in [0, 1].
        lam: the weight of longer returns, in [0, 1]; 0 is TD(0), 1 the discounted return.
        terminated, truncated, mask, cu_seqlens: as in :func:`discounted_returns`; ``truncated`` needs ``next_values``.
        next_values: like ``rewards``: the value of the state after each token. Read at every token.
        last_values: ``(...)``, or ``(sequences,)``: the value after each row, with ``values``. Default: 0.

    Returns:
        :math:`G` like ``rewards``; float32 for 16-bit input, and the promoted dtype of mixed input.

    Raises:
        TypeError: as :func:`discounted_returns`.
        ValueError: as there, or if not one of ``values`` and ``next_values`` is given.

    Sutton, Learning to Predict by the Methods of Temporal Differences, 1988. Equals ``gae(...)[1]``; torchrl's
    ``td_lambda_return_estimate`` is this with ``next_values`` and ``done = terminated | truncated``.
    Linear in rewards and values: differentiable to any order. O(tokens): reads once, writes once.

    Example:
        >>> import torch
        >>> from gradops.rl import lambda_returns
        >>> lambda_returns(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), gamma=1.0, lam=0.5)
        tensor([0.7500, 1.0000])
    """
    if (values is None) == (next_values is None):
        raise ValueError("give one of values and next_values")
    inputs, steps = scan.check(rewards, values, next_values, last_values, terminated, truncated, mask, cu_seqlens,
                               gamma, lam)
    return scan.returns(inputs, steps)
