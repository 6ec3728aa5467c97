"""Adam's moments of the last layer's rows, as CAPO keeps them."""
import torch
from torch import Tensor

from .._checks import check_device, check_one_of, check_tensor
from .._op import register
from .capo_curvature import check_betas, check_moments, check_support, work_dtype

register("capo_update_moments_", fake=lambda *_: None, vmap=False)


def capo_update_moments_(exp_avg: Tensor, exp_avg_sq: Tensor, hidden: Tensor, probs: Tensor, action_index: Tensor,
                         advantages: Tensor, token_ids: Tensor, mask: Tensor, *,
                         betas: tuple[float, float] = (0.9, 0.999), reduction: str = "mean") -> None:
    r"""Updates, in place, the moments of the rows that the kept tokens touch.

    .. math::
        g_r = c \sum_{(n,k)\,:\, id_{nk} = r} A_n v_{nk} h_n, \qquad
        m_r \leftarrow \beta_1 m_r + (1-\beta_1) g_r, \qquad s_r \leftarrow \beta_2 s_r + (1-\beta_2) g_r^2

    over the tokens :math:`n` with ``mask``, where :math:`v = e_a - \pi`. A row that no kept token has in its support
    is left alone: its moments do not decay, as with a dictionary keyed by token. Call it once per step, after
    :func:`capo_mask`, and count the calls: that is :func:`capo_curvature`'s ``step``.

    Args:
        exp_avg, exp_avg_sq: ``(U, H)``, contiguous; float64 if ``hidden`` is, else float32. Modified.
        hidden, probs, action_index, advantages, token_ids: as in :func:`capo_curvature`.
        mask: ``(...)``, bool: the tokens that count.
        betas: Adam's.
        reduction: ``"mean"``, :math:`c` = 1 / number of kept tokens, or ``"sum"``, :math:`c = 1`. The paper's could not
            be confirmed; the default is ours.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, an option is out of its range, or (CPU only, and before anything is
            modified; on CUDA such an entry is ignored) a kept token has ``action_index >= K`` or ``token_ids`` outside
            of ``[0, U)``.
        RuntimeError: a derivative is asked for.

    CAPO, arXiv 2510.00819. A stable sort of the ids, then a sum over each row's segment in the order of the tokens:
    the same bits for any number of threads. O(N K H), without an ``(N, K, H)`` tensor.

    Example:
        >>> import torch
        >>> from gradops.rl import capo_update_moments_
        >>> m, s = torch.zeros(3, 2), torch.zeros(3, 2)
        >>> hidden, probs = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.75]])
        >>> capo_update_moments_(m, s, hidden, probs, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([[2, 0]]),
        ...                      torch.tensor([True]))
        >>> m
        tensor([[-0.0750, -0.1500],
                [ 0.0000,  0.0000],
                [ 0.0750,  0.1500]])
    """
    check_support(hidden, probs, action_index, advantages)
    check_moments(exp_avg, exp_avg_sq, token_ids, hidden, probs)
    check_tensor(mask, "mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.shape != advantages.shape:
        raise ValueError(f"mask must have the shape of advantages, {tuple(advantages.shape)}, got {tuple(mask.shape)}")
    check_device(mask, "mask", hidden, "hidden")
    check_betas(betas)
    check_one_of(reduction, "reduction", ("mean", "sum"))
    n, k, work = advantages.numel(), probs.shape[-1], work_dtype(hidden)
    advantages = advantages.to(work)
    if reduction == "mean":
        advantages = advantages / mask.sum().clamp(min=1)
    torch.ops.gradops.capo_update_moments_(
        exp_avg, exp_avg_sq, hidden.reshape(n, hidden.shape[-1]), probs.to(work).reshape(n, k),
        action_index.long().reshape(n), advantages.reshape(n), token_ids.long().reshape(n, k), mask.reshape(n), *betas)
    if not torch.compiler.is_compiling():  # the compiler sees the schema
        torch.autograd.graph.increment_version((exp_avg, exp_avg_sq))
