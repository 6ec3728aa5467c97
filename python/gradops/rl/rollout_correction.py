"""Importance weights between the policy that is trained and the engine that made the rollouts."""
import math
from typing import Any

import torch
from torch import Tensor

from .._checks import check_floating, check_like, check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register
from ._policy_kinds import LEVELS
from .policy_loss import check_mask, check_sequences

MODES = ("token_truncate", "sequence_truncate", "geometric_truncate", "token_mask", "sequence_mask", "geometric_mask")


def _fake(old_logp: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    weights = torch.empty_like(old_logp, memory_format=torch.contiguous_format)
    return weights, torch.empty_like(weights, dtype=torch.bool)


_op = register("rollout_correction", fake=_fake, vmap=False)


@allow_in_graph
def rollout_correction(
    old_logp: Tensor, rollout_logp: Tensor, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None,
    mode: str = "token_truncate", low: float | None = None, high: float | None = 2.0, veto: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Weights that correct for rollouts made by another policy, or another engine, than the one that is trained.

    With the log-ratio :math:`d_t` = ``old_logp - rollout_logp`` of a token, the ratio is

    - ``token_...``: :math:`\rho_t = e^{d_t}`;
    - ``sequence_...``: :math:`\rho = e^{\sum d}` over the unmasked tokens of its sequence;
    - ``geometric_...``: :math:`\rho = e^{\mathrm{mean}\,d}`.

    ``..._truncate`` moves it into [``low``, ``high``] (truncated importance sampling); ``..._mask`` leaves it and gives
    weight 0 outside of that interval (masked importance sampling, IcePop). ``veto`` rejects every
    sequence that has an unmasked token with :math:`e^{d_t}` below it, in any mode.

    Args:
        old_logp: log-probabilities of the tokens under the policy to be trained: ``(N,)`` packed, with ``cu_seqlens``,
            or ``(B, T)`` padded; float64, float32, bfloat16 or float16.
        rollout_logp: the same as the rollout engine recorded them, converted to the dtype of the result.
        cu_seqlens: ``(S + 1,)``, int32 or int64: where sequences begin and end. On CUDA its values are not checked; no
            value makes the kernel read elsewhere.
        mask: like ``old_logp``; bool, or numbers that are not 0 where a token counts.
        mode: see above.
        low, high: bounds of the ratio; None for none.
        veto: between 0 and 1; None for no veto.

    Returns:
        ``(weights, keep)``, like ``old_logp``: weights (float64 for float64, else float32; 0 where not kept), for
        ``is_weights`` of :func:`policy_loss`; and a bool mask of the tokens neither masked nor rejected, for its
        ``mask``. Both are constants of the loss. Masking also changes the denominator of the loss, a weight of
        0 alone does not.

    Raises:
        TypeError: a tensor of the wrong dtype or layout.
        ValueError: shapes or devices that do not fit; an unknown mode; bounds out of order; on the CPU,
            ``cu_seqlens`` does not rise from 0 to N.
        RuntimeError: a derivative is asked for.

    A NaN that is not masked is rejected by the masking modes, and stays NaN in the others. Engines that record NaN for
    tokens they could not score: pass ``torch.where(rollout_logp.isnan(), old_logp, rollout_logp)``, as
    TRL does. Log-ratios are not clamped (verl: to 20); ``sequence`` sums are in float64.

    Names are TRL's and verl's. Truncation: Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training" (2025). Dr. Kernel's rejection is ``mode="geometric_mask", low=0.999, high=1.001, veto=1e-4``, of which it
    uses ``keep``; verl's ``seq_mean_k1`` applies its bounds to the inverse of our ratio. Reads the inputs
    twice (from cache, in sequences of usual length), or once for tokens without veto.

    Example:
        >>> import torch
        >>> from gradops.rl import rollout_correction
        >>> old_logp, rollout_logp = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-1.0, -4.0, -0.3]])
        >>> rollout_correction(old_logp, rollout_logp)[0]
        tensor([[1.0000, 2.0000, 0.8187]])
        >>> rollout_correction(old_logp, rollout_logp, mode="token_mask", low=0.5)
        (tensor([[1.0000, 0.0000, 0.8187]]), tensor([[ True, False,  True]]))
    """
    check_floating(old_logp, "old_logp")
    check_sequences(old_logp, "old_logp", cu_seqlens)
    check_floating(rollout_logp, "rollout_logp")
    check_like(rollout_logp, "rollout_logp", old_logp, "old_logp")
    check_mask(mask, old_logp, "old_logp")
    check_one_of(mode, "mode", MODES)
    least, most = 0.0 if low is None else float(low), math.inf if high is None else float(high)
    if not 0 <= least <= most:
        raise ValueError(f"low and high must be 0 <= low <= high, got {low} and {high}")
    if veto is not None and not 0 < veto < 1:
        raise ValueError(f"veto must be between 0 and 1, got {veto}")
    refuse_derivative("rollout_correction", old_logp=old_logp, rollout_logp=rollout_logp, mask=mask)
    computing = torch.promote_types(old_logp.dtype, torch.float32)
    level, action = mode.split("_")
    return _op(old_logp.to(computing), rollout_logp.to(computing), None if cu_seqlens is None else cu_seqlens.long(),
               None if mask is None else mask.bool(), LEVELS.index(level), action == "mask", least, most,
               -math.inf if veto is None else math.log(veto))  # fmt: skip
