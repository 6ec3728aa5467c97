"""Discounted sums of rewards."""
from torch import Tensor

from .._compiler import allow_in_graph
from . import scan


@allow_in_graph
def discounted_returns(rewards: Tensor, gamma: float, *, terminated: Tensor | None = None,
                       truncated: Tensor | None = None, next_values: Tensor | None = None,
                       last_values: Tensor | None = None, mask: Tensor | None = None,
                       cu_seqlens: Tensor | None = None) -> Tensor:
    r"""Sums each row's rewards from the end, discounted.

    .. math:: G_t = r_t + \gamma \begin{cases} 0 & \text{terminated}_t \\ n_t & \text{truncated}_t \\
        G_{t+1} & \text{else} \end{cases}

    :math:`G_T`, what follows a row's last token, is ``last_values``, or :math:`n_{T-1}` if ``next_values`` is given.
    The carry is float64, so errors do not grow with ``T``.

    Args:
        rewards: ``(..., T)``, or packed ``(N,)`` with ``cu_seqlens``; float64, float32, bfloat16 or float16.
        gamma: the discount per token, in [0, 1].
        terminated: bool like ``rewards``: the episode ends with this token; nothing that follows counts.
        truncated: bool like ``rewards``: the episode was cut off after this token, and goes on from
            ``next_values``; ``terminated`` wins where both hold.
        next_values: like ``rewards``: the value :math:`n_t` of the state after each token. Read only at truncated
            tokens and at each row's last one.
        last_values: ``(...)``, or ``(sequences,)`` with ``cu_seqlens``: the value after each row. Default: 0.
        mask: bool like ``rewards``: the tokens that count. The others (prompt, tool output, padding) are passed over
            as though the row did not hold them: they neither add nor discount, nothing there is read into a result,
            and results there are 0.
        cu_seqlens: int32 or int64 ``(sequences + 1,)``: row ``i`` is ``rewards[cu_seqlens[i]:cu_seqlens[i + 1]]``.

    Returns:
        :math:`G` like ``rewards``; float32 for 16-bit input, and the promoted dtype of mixed input.

    Raises:
        TypeError: a tensor has a wrong dtype or layout.
        ValueError: shapes or devices disagree, ``truncated`` comes without ``next_values``, ``last_values`` with
            ``next_values``, ``gamma`` is outside [0, 1], or, on the CPU,
            ``cu_seqlens`` does not rise from 0 to ``N``. CUDA offsets are not checked: wrong ones give wrong numbers,
            but nothing outside the tensors is read.

    Linear in ``rewards``, ``next_values`` and ``last_values``: differentiable to any order, and in forward mode.
    O(tokens): reads once, writes once. A row's bits depend neither on the other rows nor on the number of threads.

    Example:
        >>> import torch
        >>> from gradops.rl import discounted_returns
        >>> discounted_returns(torch.tensor([0.0, 0.0, 1.0]), 0.5)
        tensor([0.2500, 0.5000, 1.0000])
    """
    inputs, steps = scan.check(rewards, None, next_values, last_values, terminated, truncated, mask, cu_seqlens,
                               gamma, 1.0)
    return scan.returns(inputs, steps)
