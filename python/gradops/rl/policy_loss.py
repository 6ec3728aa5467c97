"""Policy-gradient losses of packed or padded token batches, with the gradient made in the forward pass."""
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._checks import check_device, check_floating, check_integers, check_tensor
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, primals, refuse_derivative, register
from ._policy_kinds import AGGREGATES, KL, LEVELS, OBJECTIVES, PolicyStats, bounds, resolve

_TOTALS = 12  # enum PolicyTotal in csrc/rl/policy_loss.h: the loss, the scale of its gradient, then PolicyStats


def _fake(logp: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    computing = torch.promote_types(logp.dtype, torch.float32)
    return (logp.new_empty(_TOTALS, dtype=torch.float64),
            torch.empty_like(logp, dtype=computing, memory_format=torch.contiguous_format))


_op = register("policy_loss", fake=_fake, vmap=False)


def policy_loss(
    logp: Tensor, old_logp: Tensor | None, advantages: Tensor, *, cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None, kind: str = "grpo", level: str | None = None, clip_low: float | None = None,
    clip_high: float | None = None, dual_clip: float | None = None, weight_cap: float = 5.0,
    tau: tuple[float, float] = (1.0, 1.05), ref_logp: Tensor | None = None, kl: str | None = None, beta: float = 0.0,
    is_weights: Tensor | None = None, aggregate: str | None = None, normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:  # fmt: skip
    r"""A policy-gradient loss over the tokens of many sequences, and what to log about it.

    With the log-ratio :math:`d_t = \log\pi_t - \log\pi^{old}_t`, the ratio :math:`r`, the advantage :math:`A` and the
    weight :math:`w` of a token,

    ======================================= ==================================================================
    kind                                    loss of a token (sg: no gradient flows through)
    ======================================= ==================================================================
    grpo, dr_grpo, bnpo, dapo, gspo, ppo    :math:`-w\min(rA, \mathrm{clip}(r, 1 - l, 1 + h) A)`; where
                                            :math:`A < 0` at most :math:`-w c A` with ``dual_clip`` c
    cispo                                   :math:`-w\,\mathrm{sg}[\mathrm{clip}(r, 1 - l, 1 + h)] A \log\pi`
    minirl                                  :math:`-\mathrm{sg}[M \min(rw, 5)] A \log\pi`; M is 0 where A > 0 and
                                            r > 1 + h, or A < 0 and r < 1 - l, and else 1
    sapo                                    :math:`-wA\,\tfrac{4}{\tau}\,\sigma(\tau (r - 1))`,
                                            :math:`\tau` = ``tau[0]`` where A > 0, else ``tau[1]``
    reinforce                               :math:`-wA\log\pi`
    ======================================= ==================================================================

    plus ``beta`` times the KL estimate against ``ref_logp``, with :math:`u = \log\pi^{ref}_t - \log\pi_t`:
    k1 is :math:`-u`, k2 :math:`u^2/2`, k3 :math:`e^u - 1 - u`; each has its own derivative. ``"k1+"`` and ``"k3+"``
    are the values of k1 and k3 with the derivative of k2, whose expectation is the gradient of the KL.

    A kind is a set of defaults, each of which an argument overrides:

    ========= ========= =============== ================
    kind      level     clip l, h       aggregate
    ========= ========= =============== ================
    grpo      token     0.2, 0.2        sequence_mean
    dr_grpo   token     0.2, 0.2        sum, over a ``normalizer`` that must be given
    bnpo      token     0.2, 0.2        token_mean
    dapo      token     0.2, 0.28       token_mean
    gspo      geometric 3e-4, 4e-4      sequence_mean
    ppo       token     0.2, 0.2, c = 3 token_mean
    cispo     token     1 (none), 4     token_mean
    minirl    token     0.2, 0.27       sum
    sapo      token     none            sequence_mean
    reinforce none      none            sequence_sum
    ========= ========= =============== ================

    Args:
        logp: log-probabilities of the tokens under the policy: ``(N,)`` packed, with ``cu_seqlens``, or ``(B, T)``
            padded; float64, float32, bfloat16 or float16. The other floating-point tensors are converted to float32,
            or to float64 for float64 ``logp``. Only ``logp`` has a gradient.
        old_logp: the same under the policy that the ratio refers to; None for the present one, so that r = 1
            and its gradient is right.
        advantages: per token, like ``logp``, or one per sequence, ``(S,)`` or ``(B,)``, never expanded in memory. (If
            N = S, it is taken per token.)
        cu_seqlens: ``(S + 1,)``, int32 or int64: sequence s has the tokens from ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1]``. On CUDA its values are not checked; no value makes the kernel read elsewhere.
        mask: like ``logp``; bool, or numbers that are not 0 where a token counts. What lies behind the mask may be
            anything, NaN too.
        kind: see above.
        level: ``"token"``: :math:`r_t = e^{d_t}`; ``"sequence"``: :math:`e^{\sum d}`; ``"geometric"``:
            :math:`e^{\mathrm{mean}\,d}`, over the unmasked tokens (TRL calls this one ``"sequence"``). The gradient is
            that of this loss; that of verl's GSPO agrees where a sequence has one advantage and one weight.
        clip_low, clip_high: l and h; ``math.inf`` for none.
        dual_clip: c; ``math.inf`` for none. TRL's ``delta``.
        weight_cap: for minirl.
        tau: for sapo.
        ref_logp, kl, beta: the KL term; ``kl`` is "k3" where ``ref_logp`` is given (verl's "low_var_kl").
        is_weights: w, not negative, per token or per sequence, such as ``rollout_correction`` makes them. It does not
            act on the KL term. For minirl, give the untruncated quotient of the old policy and the rollout's.
        aggregate: ``"token_mean"``: the mean over all unmasked tokens; ``"sequence_mean"``: the mean over sequences
            of their means; ``"sequence_sum"``: the mean over sequences of their sums; ``"sum"``. Sequences with no
            unmasked token do not count (as in verl; TRL counts them).
        normalizer: what to divide by instead of that number of tokens or sequences: a number, or a tensor of one (the
            tokens of all ranks, say), which is divided by without waiting for the device.

    Returns:
        ``(loss, stats)``: a float32 or float64 scalar, and a :class:`PolicyStats` of detached scalars. Nothing
        unmasked: the loss and its gradient are 0.

    Raises:
        TypeError: a tensor of the wrong dtype or layout.
        ValueError: shapes or devices that do not fit; an option that the kind does not have; ``normalizer`` missing;
            on the CPU, ``cu_seqlens`` does not rise from 0 to N.
        RuntimeError: another tensor than ``logp`` asks for a derivative; a second derivative is asked for.

    Log-ratios are not clamped (verl clamps them to 20, TRL does not): where :math:`e^d` overflows, r is the largest
    finite number, so that a clipped token is exact and one of zero advantage is 0. Sums are made in float64
    in a fixed order: the same bits for any number of threads, packed or padded. Tokens of groups
    without variance have zero advantage but still count in the denominator: leave them out by ``mask``, or
    keep it constant by ``normalizer``. Reads each tensor once (twice for a ratio per sequence) and writes the gradient.

    Clipping: PPO (arXiv 1707.06347), dual clip (1912.09729), GRPO (2402.03300), Dr. GRPO (2503.20783), DAPO
    (2503.14476), GSPO (2507.18071), CISPO (2506.13585; its upper bound 5 is ScaleRL's, 2510.13786), SAPO
    (2511.20347), MiniRL (2512.01374, equation 7); bnpo is TRL's name for the token mean. The sum over a sequence
    for reinforce is the textbook's; TRL and verl aggregate as configured. Binarised rewards (A3T) are
    ``kind="reinforce"`` with advantages of 0 and 1 (our reading; its paper's loss could not be confirmed); LongNAP is
    ``group_advantages(..., scale="none")`` with ``clip_low=math.inf, clip_high=math.inf, aggregate="sum"``.

    Example:
        >>> import torch
        >>> from gradops.rl import policy_loss
        >>> logp = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
        >>> old_logp = torch.tensor([-1.0, -1.0, -2.0])
        >>> loss, stats = policy_loss(logp, old_logp, torch.tensor([1.0, -1.0]), cu_seqlens=torch.tensor([0, 2, 3]))
        >>> loss.backward()
        >>> loss, logp.grad, stats.clip_high
        (tensor(-0.0500, grad_fn=<...>), tensor([-0.2500,  0.0000,  0.5000]), tensor(0.3333, dtype=torch.float64))
    """
    rule = resolve(kind, level=level, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
                   weight_cap=weight_cap, tau=tau, has_ref=ref_logp is not None, kl=kl, beta=beta,
                   aggregate=aggregate, normalizer=normalizer)  # fmt: skip
    _check(logp, old_logp, advantages, cu_seqlens, mask, ref_logp, is_weights)
    numbers = [*bounds(rule), float(weight_cap), float(tau[0]), float(tau[1]), rule.beta, rule.normalizer or 0.0]
    loss, totals = _policy_loss(
        logp, old_logp, advantages, cu_seqlens, mask, ref_logp, is_weights, OBJECTIVES.index(rule.objective),
        LEVELS.index(rule.level), KL.index(rule.kl), AGGREGATES.index(rule.aggregate), numbers,
    )  # fmt: skip
    if isinstance(normalizer, Tensor):
        loss = loss / normalizer.to(loss.dtype).reshape(())
    return loss, PolicyStats(*totals.unbind()[2:])


def _check(logp: Any, old_logp: Any, advantages: Any, cu_seqlens: Any, mask: Any, ref_logp: Any,
           is_weights: Any) -> None:
    check_floating(logp, "logp")
    check_sequences(logp, "logp", cu_seqlens)
    sequences = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("advantages", advantages),
                    ("is_weights", is_weights)):
        if x is None and name != "advantages":
            continue
        check_floating(x, name)
        per_sequence = name in ("advantages", "is_weights")
        if x.shape != logp.shape and not (per_sequence and x.shape == (sequences,)):
            wanted = f"{tuple(logp.shape)}" + (f", or one number per sequence, ({sequences},)" if per_sequence else "")
            raise ValueError(f"{name} must have the shape of logp, {wanted}, got {tuple(x.shape)}")
        check_device(x, name, logp, "logp")
    check_mask(mask, logp, "logp")


def check_sequences(logp: Tensor, name: str, cu_seqlens: Any) -> None:
    """logp must be packed, (N,) with cu_seqlens, or padded, (B, T) without."""
    if cu_seqlens is None:
        if logp.dim() != 2:
            raise ValueError(f"{name} must be (B, T), or (N,) with cu_seqlens, got shape {tuple(logp.shape)} "
                             "and no cu_seqlens")
        return
    check_integers(cu_seqlens, "cu_seqlens")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
    if logp.dim() != 1:
        raise ValueError(f"{name} must be (N,) with cu_seqlens, got shape {tuple(logp.shape)}")
    check_device(cu_seqlens, "cu_seqlens", logp, name)


def check_mask(mask: Any, logp: Tensor, name: str) -> None:
    if mask is None:
        return
    check_tensor(mask, "mask")
    if mask.dtype.is_complex:
        raise TypeError(f"mask must be bool, integer or floating-point, got {mask.dtype}")
    if mask.shape != logp.shape:
        raise ValueError(f"mask must have the shape of {name}, {tuple(logp.shape)}, got {tuple(mask.shape)}")
    check_device(mask, "mask", logp, name)


# Apart from policy_loss, because a function that torch.compile takes whole must return plain tensors.
@allow_in_graph
def _policy_loss(
    logp: Tensor, old_logp: Tensor | None, advantages: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None,
    ref_logp: Tensor | None, is_weights: Tensor | None, objective: int, level: int, kl: int, aggregate: int,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    refuse_derivative("policy_loss", old_logp=old_logp, advantages=advantages, mask=mask, ref_logp=ref_logp,
                      is_weights=is_weights)  # fmt: skip
    computing = torch.promote_types(logp.dtype, torch.float32)

    def as_computing(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype == computing else x.to(computing)

    args = (as_computing(old_logp), as_computing(advantages), None if cu_seqlens is None else cu_seqlens.long(),
            None if mask is None else mask.bool(), as_computing(ref_logp), as_computing(is_weights), objective, level,
            kl, aggregate, numbers)  # fmt: skip
    if needs_derivative(logp):
        return _PolicyLoss.apply(logp, *args)[:2]
    totals, _ = _op(logp, *args)
    return totals[0].to(computing, copy=True), totals


class _PolicyLoss(Function):
    @staticmethod
    def forward(logp: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        totals, dlogp = _op(logp, *args)
        return totals[0].to(dlogp.dtype, copy=True), totals, dlogp

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        _, totals, dlogp = output
        ctx.mark_non_differentiable(totals, dlogp)
        ctx.set_materialize_grads(False)  # it would make zeros of the size of dlogp
        ctx.save_for_backward(inputs[0], totals, dlogp)
        ctx.save_for_forward(totals, dlogp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_):
        if grad is None:
            return (None,) * 12
        logp, totals, dlogp = ctx.saved_tensors
        scale = grad * totals[1].to(grad.dtype)
        # Where a graph of the gradient is made, it must lead to logp, to be refused there.
        twice = torch.is_grad_enabled() or forward_ad._current_level >= 0  # type: ignore[attr-defined]
        out = _Scaled.apply(dlogp, scale, logp) if twice else dlogp * scale
        return out if out.dtype == logp.dtype else out.to(logp.dtype), *(None,) * 11

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_):
        totals, dlogp = primals(ctx.saved_tensors)
        return (dlogp * tangent).sum() * totals[1].to(dlogp.dtype), None, None


class _Scaled(Function):
    """The gradient: what the forward pass saved, times a scalar; refuses to be differentiated again."""

    @staticmethod
    def forward(dlogp: Tensor, scale: Tensor, logp: Tensor) -> Tensor:
        return dlogp * scale

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        raise RuntimeError("policy_loss has no second derivative")
