"""How far one policy-gradient step would move the policy at each token: CAPO's last-layer model."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_integers, check_like, check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register


def _three(like: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (like.new_empty(like.shape[:1], dtype=work) for _ in range(3))
    return a, b, c


_op = register("capo_curvature", fake=lambda hidden, probs, *_: _three(hidden, probs.dtype), vmap=False)
_op_sgd = register("capo_curvature_sgd", fake=lambda hidden, logp, *_: _three(hidden, logp.dtype), vmap=False)


@allow_in_graph
def capo_curvature(hidden: Tensor, probs: Tensor, action_index: Tensor, advantages: Tensor, *, model: str = "sgd",
                   token_ids: Tensor | None = None, exp_avg: Tensor | None = None, exp_avg_sq: Tensor | None = None,
                   betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                   step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    r"""First- and second-order change of the objective, and of the policy, along each token's own update.

    With the final hidden state :math:`h`, probabilities :math:`\pi` on a support of ``K`` tokens,
    :math:`v = e_a - \pi` and the last layer's gradient :math:`g = A\, v h^\top`, the optimizer moves along
    :math:`G`, and everything depends on :math:`u = G h`:

    .. math::
        \langle g, G\rangle = A\, v^\top u, \qquad
        G' \tilde H G = A \left[(v^\top u)^2 - \Big(\sum \pi u^2 - \big(\sum \pi u\big)^2\Big)\right], \qquad
        G' \tilde F G = (v^\top u)^2

    ``model="sgd"``: :math:`G = g`, so :math:`u = A \|h\|^2 v`. ``model="adam"``: with moments ``m``, ``s`` per row of
    the vocabulary and :math:`t` = ``step``,

    .. math::
        G = \frac{(\beta_1 m + (1-\beta_1) g) / (1-\beta_1^{t+1})}
                 {\sqrt{(\beta_2 s + (1-\beta_2) g^2) / (1-\beta_2^{t+1})} + \epsilon}

    :func:`capo_mask` turns the three results into the tokens to keep.

    Args:
        hidden: ``(..., H)``; float64, float32, bfloat16 or float16.
        probs: ``(..., K)``, the softmax over the support, for instance over the K largest logits.
        action_index: ``(...)``, int32 or int64: where the sampled token is in the support; -1 if it is not there
            (then :math:`v = -\pi`, as in the authors' code).
        advantages: ``(...)``.
        model: ``"sgd"`` or ``"adam"``. The next arguments belong to ``"adam"``.
        token_ids: ``(..., K)``, int32 or int64: the row of ``exp_avg`` and ``exp_avg_sq`` of each token of the support.
        exp_avg, exp_avg_sq: ``(U, H)``, contiguous; float64 if ``hidden`` is, else float32. A row that was never
            updated holds zeros. ``U`` is the vocabulary, or only the tokens that occur, numbered densely.
        betas, eps: Adam's; ``eps`` positive.
        step: how many updates the moments have had; 0 at first.

    Returns:
        ``(grad_dot, hess, fisher)``, each ``(...)``: :math:`\langle g, G\rangle`, :math:`G'\tilde H G`,
        :math:`G' \tilde F G`; float64 if ``hidden`` is, else float32. They are constants of the training loss. The
        learning rate comes in later, in :func:`capo_mask`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, an option is out of its range, or (CPU only; on CUDA that token's
            results are NaN) ``action_index >= K`` or ``token_ids`` outside of ``[0, U)``.
        RuntimeError: a derivative is asked for.

    CAPO, arXiv 2510.00819. ``"sgd"`` reads ``hidden`` and ``probs`` once, O(H + K) per token; ``"adam"`` gathers
    ``2 K`` rows, O(K H), and keeps no ``(..., K, H)`` tensor. For the full vocabulary, see :func:`capo_curvature_sgd`.

    Example:
        >>> import torch
        >>> from gradops.rl import capo_curvature
        >>> hidden, probs = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.75]])
        >>> capo_curvature(hidden, probs, torch.tensor([0]), torch.tensor([1.0]))
        (tensor([5.6250]), tensor([21.0938]), tensor([31.6406]))
    """
    check_support(hidden, probs, action_index, advantages)
    refuse_derivative("capo_curvature", hidden=hidden, probs=probs, advantages=advantages, exp_avg=exp_avg,
                      exp_avg_sq=exp_avg_sq)
    check_one_of(model, "model", ("sgd", "adam"))
    check_betas(betas)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)) or step < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}")
    work = work_dtype(hidden)
    if model == "adam":
        check_moments(exp_avg, exp_avg_sq, token_ids, hidden, probs)
    else:
        for name, x in (("token_ids", token_ids), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            if x is not None:
                raise ValueError(f'{name} must be None with model="sgd"')
    n, k = advantages.numel(), probs.shape[-1]
    out = _op(hidden.reshape(n, hidden.shape[-1]), probs.to(work).reshape(n, k), action_index.long().reshape(n),
              advantages.to(work).reshape(n), None if token_ids is None else token_ids.long().reshape(n, k), exp_avg,
              exp_avg_sq, betas[0], betas[1], eps, step)
    return tuple(x.reshape(advantages.shape) for x in out)  # type: ignore[return-value]


@allow_in_graph
def capo_curvature_sgd(hidden: Tensor, logp: Tensor, sum_p2: Tensor, sum_p3: Tensor,
                       advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""What :func:`capo_curvature` computes with ``model="sgd"``, from moments of the full softmax.

    With :math:`p` the sampled token's probability and :math:`S_k = \sum \pi^k`:

    .. math::
        \|v\|^2 = (1-p)^2 + (S_2 - p^2), \quad
        q = \sum \pi v^2 - \Big(\sum \pi v\Big)^2
          = p(1-p)^2 + (S_3 - p^3) - \big(p(1-p) - (S_2 - p^2)\big)^2

    and, with :math:`c = A \|h\|^2`, the results :math:`A c \|v\|^2`, :math:`A c^2 (\|v\|^4 - q)`,
    :math:`c^2 \|v\|^4`. ``selective_log_softmax(..., return_=("logp", "sum_p2", "sum_p3"))`` gives the moments in the
    pass that gives ``logp``.

    Args:
        hidden: ``(..., H)``; float64, float32, bfloat16 or float16.
        logp: ``(...)``, the log-probability of the sampled token.
        sum_p2, sum_p3: ``(...)``, the sums of the squares and of the cubes of all probabilities.
        advantages: ``(...)``.

    Returns:
        ``(grad_dot, hess, fisher)``, each ``(...)``; float64 if ``hidden`` is, else float32. Constants of the training
        loss. ``S_2 - p^2`` and ``S_3 - p^3`` lose the digits they share: where the policy is nearly certain, the error
        is of the size of the rounding of ``sum_p2``, not of the result. Differences below zero count as zero.

    Raises:
        TypeError: an argument is no dense real floating-point tensor.
        ValueError: shapes or devices do not fit.
        RuntimeError: a derivative is asked for.

    CAPO, arXiv 2510.00819, whose code keeps to the K largest logits; the closed form is ours. Reads ``hidden`` once.

    Example:
        >>> import torch
        >>> from gradops.rl import capo_curvature_sgd
        >>> p = torch.tensor([0.25, 0.75])
        >>> capo_curvature_sgd(torch.tensor([1.0, 2.0]), p[0].log(), (p**2).sum(), (p**3).sum(), torch.tensor(1.0))
        (tensor(5.6250), tensor(21.0938), tensor(31.6406))
    """
    check_floating(hidden, "hidden")
    if hidden.dim() < 1:
        raise ValueError("hidden must have at least 1 dimension (..., H), got none")
    check_floating(logp, "logp")
    if logp.shape != hidden.shape[:-1]:
        raise ValueError(f"logp must have hidden's shape without its last dimension, {tuple(hidden.shape[:-1])}, "
                         f"got {tuple(logp.shape)}")
    check_device(logp, "logp", hidden, "hidden")
    rest = {"sum_p2": sum_p2, "sum_p3": sum_p3, "advantages": advantages}
    for name, x in rest.items():
        check_floating(x, name)
        check_like(x, name, logp, "logp")
    refuse_derivative("capo_curvature_sgd", hidden=hidden, logp=logp, **rest)
    n, work = logp.numel(), work_dtype(hidden)
    out = _op_sgd(hidden.reshape(n, hidden.shape[-1]), *(x.to(work).reshape(n) for x in (logp, *rest.values())))
    return tuple(x.reshape(logp.shape) for x in out)  # type: ignore[return-value]


def work_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def check_support(hidden: Any, probs: Any, action_index: Any, advantages: Any) -> None:
    """The arguments that describe tokens, for capo_curvature and capo_update_moments_."""
    check_floating(hidden, "hidden")
    check_floating(probs, "probs")
    if hidden.dim() < 1 or probs.dim() < 1 or hidden.shape[:-1] != probs.shape[:-1]:
        raise ValueError(f"hidden (..., H) and probs (..., K) must agree in all but the last dimension, got "
                         f"{tuple(hidden.shape)} and {tuple(probs.shape)}")
    check_device(probs, "probs", hidden, "hidden")
    check_integers(action_index, "action_index")
    check_floating(advantages, "advantages")
    for name, x in (("action_index", action_index), ("advantages", advantages)):
        if x.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} must have hidden's shape without its last dimension, "
                             f"{tuple(hidden.shape[:-1])}, got {tuple(x.shape)}")
        check_device(x, name, hidden, "hidden")


def check_moments(exp_avg: Any, exp_avg_sq: Any, token_ids: Any, hidden: Tensor, probs: Tensor) -> None:
    for name, x in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_floating(x, name)
        if x.dtype != work_dtype(hidden):
            raise TypeError(f"{name} must be {work_dtype(hidden)} for hidden of {hidden.dtype}, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] != hidden.shape[-1]:
            raise ValueError(f"{name} must have shape (U, H) with H = {hidden.shape[-1]}, got {tuple(x.shape)}")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
        check_device(x, name, hidden, "hidden")
    check_like(exp_avg_sq, "exp_avg_sq", exp_avg, "exp_avg")
    check_integers(token_ids, "token_ids")
    check_like(token_ids, "token_ids", probs, "probs")


def check_betas(betas: Any) -> None:
    if not (len(betas) == 2 and all(0 <= b < 1 for b in betas)):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
