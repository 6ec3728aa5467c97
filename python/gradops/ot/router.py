"""Mixture-of-experts routing by sparsity-constrained optimal transport."""
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_floating, check_number, check_one_of
from .._compiler import allow_in_graph
from .._op import Function, needs_derivative, primals, register

MODES = ("tokens_choose", "experts_choose")
INTEGERS: Any = (int, torch.SymInt)  # capacity comes from a shape, which torch.compile may keep open


class RouterInfo(NamedTuple):
    """What became of every token, and how good the plan is; constants of the training loss.

    For logits ``(..., T, E)``: ``plan``, shaped like the indices, the plan's mass in each slot (0: unused; float64 for
    float64 logits, else float32, as it is computed); ``load (..., E)``, tokens each expert takes; ``taken (..., T)``,
    experts that take a token; ``overflow (..., T)``, experts that were full. A token with ``taken`` 0 is dropped: for
    lack of capacity if ``overflow`` is positive, else since no expert gave it any mass. ``dropped (...)`` counts these,
    without masked tokens. ``residual (...)``: the sum of \\|row sum - mass\\| of the plan over the rows, divided by the
    sum of their masses; ``dual_value (...)``: the semi-dual objective reached. Both float64, before capacity applies.
    """

    plan: Tensor
    load: Tensor
    taken: Tensor
    overflow: Tensor
    dropped: Tensor
    residual: Tensor
    dual_value: Tensor


def _fake(logits, experts_choose, width, capacity, n_steps, gamma, lr):
    *lead, tokens, experts = logits.shape
    slots = (*lead, experts if experts_choose else tokens, width)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def new(*shape, dtype=torch.int64):
        return logits.new_empty((*lead, *shape), dtype=dtype)

    return (logits.new_empty(slots, dtype=torch.int64), logits.new_empty(slots), logits.new_empty(slots, dtype=wide),
            new(experts), new(tokens), new(tokens), new(), new(dtype=torch.float64), new(dtype=torch.float64))


_op = register("router", fake=_fake)


@allow_in_graph
def router(logits: Tensor, *, capacity: int | None = None, top_k: int | None = None, n_steps: int = 20,
           gamma: float = 1.0, mode: str = "tokens_choose", lr: float = 1e-2) -> tuple[Tensor, Tensor, RouterInfo]:
    r"""Assigns the tokens of each group to experts by optimal transport with a bounded number of choices.

    The plan :math:`P` (rows :math:`i` with mass :math:`a`, columns :math:`j` with mass :math:`b`) minimises

    .. math::
        \langle P, C \rangle + \tfrac{\gamma}{2} \|P\|^2, \quad C = -\mathrm{softmax}(\text{logits}), \quad
        P \ge 0, \; P \mathbf{1} = a, \; P^\top \mathbf{1} = b, \; \|p_j\|_0 \le k,

    with mass 1 for every token and :math:`T / E` for every expert. "tokens_choose": columns are tokens and
    ``k = top_k``; "experts_choose": columns are experts and ``k = capacity``. It is found by ``n_steps`` of Adam on the
    row potentials of the semi-dual, from zero. Column masses and ``k`` then hold; row masses only about so:
    ``info.residual`` says how much. Potentials move by ``n_steps * lr`` at most, and gates that differ by more are not
    evened out; nor does the residual vanish with more steps where ``k`` is too small for the optimum of the semi-dual
    to be a plan. Masses, not counts, are balanced. Where tokens choose and ``capacity`` is given, an expert keeps the
    tokens that give it the most mass, ties to the lowest token. A token may end without any expert.

    Args:
        logits: ``(..., T, E)``, groups leading: groups know nothing of each other. float64, float32, bfloat16 or
            float16. Not modified. -inf masks an expert for a token; a token with -inf alone, such as padding, takes no
            part.
        capacity: tokens an expert may have; needed where experts choose, else None for any number. Common is
            ``ceil(factor * T * k / E)``, k the experts of a token. May exceed T.
        top_k: experts a token may have, in [1, E]; only where tokens choose, and needed there.
        n_steps: steps of Adam (betas 0.9 and 0.999, eps 1e-8), each one pass over the gates.
        gamma: weight of the quadratic term; larger spreads tokens more.
        mode: "tokens_choose" or "experts_choose".
        lr: learning rate of Adam.

    Returns:
        ``indices`` int64, ``(..., T, top_k)`` experts of a token, or ``(..., E, capacity)`` tokens of an expert:
        ascending, then -1 for unused slots; ``weights``, shaped alike in the dtype of ``logits``: the softmax gates
        there, 0 where unused, differentiable in ``logits`` with the assignment constant; ``info``, a
        :class:`RouterInfo`.

    Raises:
        TypeError: ``logits`` is no dense real floating-point tensor.
        ValueError: an argument is out of its range, or ``top_k`` and ``capacity`` do not fit the mode.

    A group with a NaN or +inf logit gets no indices, and NaN for its weights, plan, residual and value: this stays in
    the group, and costs no wait on CUDA. Arithmetic is float32 (float64 for float64 logits), sums of the value and the
    residual float64. Gradients within 64 eps of a row's mass count as zero, which Adam would blow up to full steps.
    O(n_steps T E) for each group; nothing waits for the device, so that it may be captured in a CUDA graph.

    Liu, Puigcerver and Blondel, Sparsity-constrained optimal transport, arXiv 2209.15466; defaults are those of their
    code for V-MoE (google-research/vmoe: 20 steps, rate 1e-2, gamma 1, softmax gates as combine weights). That stops
    early on a gradient below 1e-3, fills buffers by choice and position instead of mass, and lets experts fill up with
    tokens of zero mass.

    Example:
        >>> import torch
        >>> from gradops.ot import router
        >>> logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [1.5, 0.0]])
        >>> indices, weights, info = router(logits, top_k=1, n_steps=60)
        >>> indices.T, info.load
        (tensor([[0, 0, 1, 1]]), tensor([2, 2]))
    """
    width, capacity = _check(logits, capacity, top_k, n_steps, gamma, mode, lr)
    args = (logits, mode == "experts_choose", width, capacity, n_steps, float(gamma), float(lr))
    indices, weights, *info = _Router.apply(*args) if needs_derivative(logits) else _op(*args)
    return indices, weights, RouterInfo(*info)


def _check(logits: Any, capacity: Any, top_k: Any, n_steps: Any, gamma: float, mode: str, lr: float) -> tuple[int, int]:
    """The number of slots, and the capacity or -1."""
    check_floating(logits, "logits")
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have the shape (..., T, E) with E > 0, got {tuple(logits.shape)}")
    check_one_of(mode, "mode", MODES)
    if not isinstance(n_steps, INTEGERS) or n_steps < 0:
        raise ValueError(f"n_steps must be an int, not negative, got {n_steps!r}")
    check_number(gamma, "gamma")
    check_number(lr, "lr")
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr must be finite and not negative, got {lr}")
    if capacity is not None and (not isinstance(capacity, INTEGERS) or capacity < 1):
        raise ValueError(f"capacity must be a positive int, got {capacity!r}")
    if mode == "experts_choose":
        if top_k is not None:
            raise ValueError(f"top_k is for tokens_choose; where experts choose give capacity alone, got {top_k!r}")
        if capacity is None:
            raise ValueError("capacity must be given where experts choose")
        return capacity, -1
    if not isinstance(top_k, INTEGERS) or not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k must be an int in [1, {logits.shape[-1]}] where tokens choose, got {top_k!r}")
    return top_k, -1 if capacity is None else capacity


def _gates(logits: Tensor) -> Tensor:
    """Softmax over experts; zeros for a masked token."""
    masked = (logits == -float("inf")).all(-1, keepdim=True)
    return logits.masked_fill(masked, 0).softmax(-1).masked_fill(masked, 0)


def _by_token(x: Tensor, indices: Tensor, experts_choose: bool, like: Tensor) -> Tensor:
    """x of the slots, spread to the shape of the logits."""
    used = indices >= 0
    out = torch.zeros_like(like.mT if experts_choose else like)
    out = out.scatter_add(-1, indices.clamp(min=0), torch.where(used, x, 0).to(out.dtype))
    return out.mT if experts_choose else out


def _by_slot(x: Tensor, indices: Tensor, experts_choose: bool) -> Tensor:
    out = (x.mT if experts_choose else x).gather(-1, indices.clamp(min=0))
    return torch.where(indices >= 0, out, 0)


class _Router(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits, experts_choose, width, capacity, n_steps, gamma, lr):
        return _op(logits, experts_choose, width, capacity, n_steps, gamma, lr)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        logits, ctx.experts_choose, *_ = inputs
        indices, _, *rest = output
        ctx.mark_non_differentiable(indices, *rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, indices)
        ctx.save_for_forward(logits, indices)

    @staticmethod
    def backward(ctx: Any, _, grad: Tensor | None, *__):
        if grad is None:
            return (None,) * 7
        logits, indices = ctx.saved_tensors
        gates = _gates(logits)
        g = _by_token(grad, indices, ctx.experts_choose, logits)
        return gates * (g - (gates * g).sum(-1, keepdim=True)), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_):
        logits, indices = primals(ctx.saved_tensors)
        gates = _gates(logits)
        change = gates * (tangent - (gates * tangent).sum(-1, keepdim=True))
        return None, _by_slot(change, indices, ctx.experts_choose), *(None,) * 7
