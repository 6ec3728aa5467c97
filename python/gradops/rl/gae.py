"""Generalised advantage estimation."""
from torch import Tensor

from .._compiler import allow_in_graph
from . import scan


@allow_in_graph
def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float, terminated: Tensor | None = None,
        truncated: Tensor | None = None, next_values: Tensor | None = None, last_values: Tensor | None = None,
        mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimates and the returns they aim at.

    .. math::

        \delta_t &= r_t + \gamma n_t - V_t \\
        A_t &= \delta_t + \gamma\lambda A_{t+1}, \qquad R_t = A_t + V_t

    :math:`n_t` is the value of what follows token ``t``: 0 if terminated, else ``next_values[t]``, or without them
    ``values`` of the next token and, after the last one, ``last_values``. :math:`A_{t+1}` counts as 0 where token ``t``
    is terminated or truncated, and after a row. The carry is float64, so errors do not grow with ``T``.

    Args:
        rewards: ``(..., T)``, or packed ``(N,)`` with ``cu_seqlens``; float64, float32, bfloat16 or float16.
        values: like ``rewards``: :math:`V_t`, the value of the state before each token.
        gamma: the discount per token, in [0, 1].
        lam: the decay of later temporal differences, in [0, 1].
        terminated: bool like ``rewards``: the episode ends with this token; nothing that follows counts.
        truncated: bool like ``rewards``: the episode was cut off after this token; :math:`n_t` still counts, later
            tokens do not. Needs ``next_values``.
        next_values: like ``rewards``: the value of the state after each token. Read at every token that is not
            terminated.
        last_values: ``(...)``, or ``(sequences,)`` with ``cu_seqlens``: the value after each row. Default: 0.
        mask: bool like ``rewards``: the tokens that count. The others (prompt, tool output, padding) are passed over
            as though the row did not hold them: they neither add nor discount, nothing there is read into a result,
            and results there are 0.
        cu_seqlens: int32 or int64 ``(sequences + 1,)``: row ``i`` is ``rewards[cu_seqlens[i]:cu_seqlens[i + 1]]``.

    Returns:
        ``(advantages, returns)`` like ``rewards``; float32 for 16-bit input, the promoted dtype of mixed input.
        Advantages are not whitened.

    Raises:
        TypeError: a tensor has a wrong dtype or layout.
        ValueError: shapes or devices disagree, ``truncated`` comes without ``next_values``, ``last_values`` with
            ``next_values``, ``gamma`` or ``lam`` is outside [0, 1], or, on the CPU,
            ``cu_seqlens`` does not rise from 0 to ``N``. CUDA offsets are not checked: wrong ones give wrong numbers,
            but nothing outside the tensors is read.

    Schulman et al., arXiv 1506.02438, eq. 16. verl's ``compute_gae_advantage_return`` is this with its
    ``response_mask`` as ``mask``, then whitened; where the mask is 0 it holds the carry, ours 0. torchrl's
    ``generalized_advantage_estimate`` is this with ``next_values`` and ``done = terminated | truncated``. PufferLib
    shifts rewards and flags by one token; ours are the token's own.
    Linear in rewards and values: differentiable to any order, and in forward mode. O(tokens): reads once, writes once.
    A row's bits depend neither on the other rows nor on the number of threads.

    Example:
        >>> import torch
        >>> from gradops.rl import gae
        >>> advantages, returns = gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), gamma=1.0, lam=0.5)
        >>> advantages
        tensor([0.2500, 0.5000])
        >>> returns
        tensor([0.7500, 1.0000])
    """
    inputs, steps = scan.check(rewards, values, next_values, last_values, terminated, truncated, mask, cu_seqlens,
                               gamma, lam)
    return scan.advantages(inputs, steps)
