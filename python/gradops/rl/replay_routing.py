"""Weights of recorded experts, for mixture-of-experts layers that replay a routing."""
import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_ids, check_integers
from .._compiler import allow_in_graph


@allow_in_graph
def replay_routing(router_logits: Tensor, recorded_ids: Tensor, *, renormalize: bool = True) -> Tensor:
    r"""The gate weights of the experts that an earlier forward pass chose, from the present router.

    .. math:: w_k = \frac{e^{z_{i_k}}}{\sum_j e^{z_{i_j}}} \quad\text{or, not renormalised,}\quad
              w_k = \frac{e^{z_{i_k}}}{\sum_{e} e^{z_e}}

    Only the choice of experts is replayed; the weights are live, so the gradient reaches the router.

    Args:
        router_logits: ``(..., E)``; float64, float32, bfloat16 or float16.
        recorded_ids: ``(..., K)``, int32 or int64: the experts of each token, in any order, each once.
        renormalize: divide by the sum over the recorded experts, as routers with ``norm_topk_prob`` do; else over all.

    Returns:
        ``(..., K)``, in the order of ``recorded_ids``: float64 for float64 logits, else float32.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes or devices that do not fit; on the CPU, an id not in [0, E); on CUDA, and where compiled or
            under ``torch.vmap``, that is an error of torch's.

    Routing replay of "Stabilizing reinforcement learning with LLMs" (arXiv 2512.01374): R2 records in the training
    engine (of the old policy), R3 in the rollout engine. Its text on renormalisation could not be confirmed; the
    default is ours. Two torch operations that touch K of E logits, no kernel of its own; differentiable to any order.

    Example:
        >>> import torch
        >>> from gradops.rl import replay_routing
        >>> replay_routing(torch.tensor([[1.0, 2.0, 3.0]]).log(), torch.tensor([[2, 0]]))
        tensor([[0.7500, 0.2500]])
        >>> replay_routing(torch.tensor([[1.0, 2.0, 3.0]]).log(), torch.tensor([[2, 0]]), renormalize=False)
        tensor([[0.5000, 0.1667]])
    """
    check_floating(router_logits, "router_logits")
    check_integers(recorded_ids, "recorded_ids")
    check_device(recorded_ids, "recorded_ids", router_logits, "router_logits")
    if router_logits.dim() < 1 or recorded_ids.dim() < 1 or router_logits.shape[:-1] != recorded_ids.shape[:-1]:
        raise ValueError("recorded_ids must be (..., K) for router_logits (..., E), got shapes "
                         f"{tuple(recorded_ids.shape)} and {tuple(router_logits.shape)}")
    check_ids(recorded_ids, "recorded_ids", router_logits.shape[-1])
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    ids = recorded_ids.long()
    if renormalize:
        return router_logits.gather(-1, ids).softmax(-1, dtype=dtype)
    logits = router_logits.to(dtype)
    return (logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)).exp()
