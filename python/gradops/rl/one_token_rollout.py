"""The one-token rollout loss, exact or sampled."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_integers, check_like, check_one_of
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, primals, register


def _fake(logits, targets, seeds, temperature, beta, k):
    rows = logits.shape[:-1]
    loss = logits.new_empty(rows, dtype=_loss_dtype(logits))
    return (loss, logits.new_empty((*rows, 3), dtype=torch.float64), logits.new_empty((*rows, k), dtype=torch.int64))


_op = register("one_token_rollout", fake=_fake)
_backward = register("one_token_rollout_backward", fake=lambda logits, *_: torch.empty_like(
    logits, memory_format=torch.contiguous_format))


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@allow_in_graph
def one_token_rollout_loss(logits: Tensor, targets: Tensor, *, temperature: float = 1.5, beta: float = -0.1,
                           k: int | None = None, seeds: Tensor | None = None,
                           generator: torch.Generator | None = None, reduction: str = "mean") -> Tensor:
    r"""Fine-tunes on given tokens as if each were a rollout of one token: the policy gradient of drawing that token.

    With :math:`\pi = \mathrm{softmax}(z)` of a row of ``logits``, its target :math:`x` and the sampling policy
    :math:`\pi' = \mathrm{softmax}(z / \text{temperature})`, taken as a constant,

    .. math::
        L = -\sum_a \pi'_a R_a \log \pi_a, \quad R_x = 1, \; R_{a \ne x} = \beta, \qquad
        \frac{\partial L}{\partial z} = -(1 - \beta)\, \pi'_x (e_x - \pi) - \beta\, (\pi' - \pi),

    exactly, or with ``k`` an average over that many draws :math:`a \sim \pi'`. The exact form is what the sampled one
    tends to for large ``k``, without its noise, and costs less. At ``temperature=1`` its gradient is that of the loss
    :math:`-\pi_x^{detached} \log \pi_x` (dynamic fine-tuning), times :math:`1 - \beta`.

    Args:
        logits: ``(..., V)``; float64, float32, bfloat16 or float16. Not modified. A logit of -inf is a masked token.
        targets: ``(...)``; int64 or int32, in [0, V).
        temperature: of the sampling policy; above 1 it explores. The default is ours.
        beta: the reward of every other token; below 1, slightly negative in the paper. The default is ours.
        k: draws per row; None is the exact form.
        seeds: ``(...)``, int64: each row's own. A row's draws depend on its seed and its logits only, wherever it
            stands in the batch and however many threads there are. CPU and CUDA draw the same but for rounding.
        generator: where seeds come from if they are not given; None is torch's default one.
        reduction: "mean" over all rows, "sum" or "none".

    Returns:
        A scalar, or ``(...)`` with ``reduction="none"``, in nats; float64 for float64 logits, else float32.

    Raises:
        TypeError: an argument is no dense tensor of its kind.
        ValueError: shapes, devices or numbers do not fit; on the CPU, a target outside [0, V). On CUDA this is not
            checked, since that would stop the stream: such a row's loss and gradient are NaN.

    Arithmetic is in float32 (float64 for float64 logits), with sums carried on in float64. The loss reads the logits
    once (with ``k`` two or three times), its gradient once more; no other ``(..., V)`` tensor is made. Differentiable
    to any order with :math:`\pi'`, or the draws, constant: second derivatives in plain PyTorch.

    One-token rollout (OTR), arXiv 2509.26313: log-probabilities untempered, no baseline, the mean over tokens, k = 256.
    Its temperature and beta could not be confirmed. The exact form is ours.

    Example:
        >>> import torch
        >>> from gradops.rl import one_token_rollout_loss
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        >>> one_token_rollout_loss(logits, torch.tensor([0, 2]), temperature=1.0, beta=0.0, reduction="none")
        tensor([0.2712, 0.3662])
    """
    _check(logits, targets, temperature, beta, k, seeds, reduction)
    if k is not None and seeds is None:
        seeds = torch.randint(-2**63, 2**63 - 1, targets.shape, generator=generator, device=logits.device)
    args = (logits, targets.long(), seeds, float(temperature), float(beta), k or 0)
    loss = (_OneTokenRollout.apply(*args) if needs_derivative(logits) else _op(*args))[0]
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _check(logits: Any, targets: Any, temperature: float, beta: float, k: Any, seeds: Any, reduction: str) -> None:
    check_floating(logits, "logits")
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have the shape (..., V) with V > 0, got {tuple(logits.shape)}")
    check_integers(targets, "targets")
    check_device(targets, "targets", logits, "logits")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(logits.shape[:-1])} for logits of shape "
                         f"{tuple(logits.shape)}, got {tuple(targets.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not -float("inf") < beta < float("inf"):
        raise ValueError(f"beta must be finite, got {beta}")
    check_one_of(reduction, "reduction", ("mean", "sum", "none"))
    if k is None:
        if seeds is not None:
            raise ValueError("seeds are for the sampled form: give k, the number of draws, as well")
        return
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a positive int, or None for the exact form, got {k!r}")
    if seeds is not None:
        check_like(seeds, "seeds", targets, "targets")
        if seeds.dtype != torch.int64:
            raise TypeError(f"seeds must be int64, got {seeds.dtype}")


class _OneTokenRollout(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits, targets, seeds, temperature, beta, k):
        return _op(logits, targets, seeds, temperature, beta, k)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        logits, targets, _, ctx.temperature, ctx.beta, _ = inputs
        _, state, samples = output
        ctx.mark_non_differentiable(state, samples)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, samples, state)
        ctx.save_for_forward(logits, targets, samples, state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_):
        if grad is None:
            return (None,) * 6
        logits, targets, samples, state = ctx.saved_tensors
        if needs_derivative(logits, grad):
            p, w = _policies(logits, targets, samples, ctx.temperature, ctx.beta)
            out = (grad[..., None] * (w.sum(-1, keepdim=True) * p - w)).to(logits.dtype)
        else:
            out = _backward(logits, targets, samples, state, grad, ctx.temperature, ctx.beta)
        return out, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_):
        logits, targets, samples, _state = primals(ctx.saved_tensors)
        p, w = _policies(logits, targets, samples, ctx.temperature, ctx.beta)
        slope = ((w.sum(-1, keepdim=True) * p - w) * tangent.to(p.dtype)).sum(-1)
        return slope.to(_loss_dtype(logits)), None, None


def _policies(logits: Tensor, targets: Tensor, samples: Tensor, temperature: float, beta: float,
              ) -> tuple[Tensor, Tensor]:
    """In differentiable torch: p, and the constant weights w of L = -sum w log p."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    index = targets[..., None]
    if samples.shape[-1]:
        reward = torch.where(samples == index, 1.0, beta).to(z.dtype) / samples.shape[-1]
        w = torch.zeros_like(z).scatter_add(-1, samples, reward)
    else:
        reward = torch.full_like(z, beta).scatter(-1, index, 1.0)
        w = (z / temperature).softmax(-1).detach() * reward
    return z.softmax(-1), w
