"""Log-probabilities from hidden states and the output layer, without all the logits at once."""
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import check_device, check_integers, check_linear
from .._compiler import allow_in_graph
from .._op import Function, _library, needs_derivative, primals, register
from .linear_chunks import backward, forward, tangents
from .selective_log_softmax import OUTPUTS
from .vocabulary_parallel import merge_shards

_library.define("linear_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float temperature, "
                "float softcap, bool entropy, bool moments, bool partial, int chunk_size) "
                "-> (Tensor logp, Tensor lse, Tensor entropy, Tensor sum_p2, Tensor sum_p3)")
_library.define("linear_logprob_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor lse, "
                "Tensor? entropy, Tensor grad_logp, Tensor grad_lse, Tensor? grad_entropy, float temperature, "
                "float softcap, bool need_hidden, bool need_weight, bool need_bias, bool wide_weight, int chunk_size) "
                "-> (Tensor, Tensor, Tensor)")
torch.library.impl(_library, "linear_logprob", "CompositeExplicitAutograd")(forward)
torch.library.impl(_library, "linear_logprob_backward", "CompositeExplicitAutograd")(backward)


def _fake(hidden, weight, targets, bias, temperature, softcap, entropy, moments, partial, chunk_size):
    n = hidden.shape[0]
    shapes = (targets.shape, (n,), (n,) if entropy else (n, 0), *[(n,) if moments else (n, 0)] * 2)
    return tuple(hidden.new_empty(shape, dtype=torch.float64) for shape in shapes)


def _fake_backward(hidden, weight, targets, bias, lse, entropy, grad_logp, grad_lse, grad_entropy, temperature, softcap,
                   need_hidden, need_weight, need_bias, wide_weight, chunk_size):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.new_empty(hidden.shape if need_hidden else (0,)),
            weight.new_empty(weight.shape if need_weight else (0,), dtype=wide if wide_weight else weight.dtype),
            weight.new_empty(weight.shape[:1] if need_bias else (0,), dtype=wide))


_op = register("linear_logprob", fake=_fake, vmap=False)
_backward = register("linear_logprob_backward", fake=_fake_backward, vmap=False)


def _one_by_one(op: Any) -> Any:
    """A vmap rule: the weight may be batched too, and then there is no product of all at once."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        items = [op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
                 for i in range(info.batch_size)]
        return tuple(torch.stack(out) for out in zip(*items, strict=True)), (0,) * len(items[0])

    return rule


for _name in ("linear_logprob", "linear_logprob_backward"):
    torch.library.register_vmap(f"gradops::{_name}", _one_by_one(getattr(torch.ops.gradops, _name)))


@allow_in_graph
def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
                   temperature: float = 1.0, softcap: float | None = None, return_: Sequence[str] = ("logp",),
                   out_dtype: torch.dtype = torch.float32, chunk_size: int = 4096,
                   group: ProcessGroup | None = None, vocab_start: int | None = None) -> Tensor | tuple[Tensor, ...]:
    r"""Log-probabilities of tokens from hidden states, without ever holding all the logits.

    .. math::
        x = h W^\top + b, \quad z = \frac{c(x)}{T}, \quad p = \mathrm{softmax}(z), \qquad
        \mathrm{logp} = z_{target} - \mathrm{lse}

    with lse, entropy, sum_p2 and sum_p3, temperature T and softcap c as in :func:`selective_log_softmax`. The logits of
    all rows for ``chunk_size`` tokens of the vocabulary at a time are a product, which the kernels of
    :func:`selective_log_softmax` read once. The backward pass makes them once more, overwrites them by their gradient,
    and has this part of the gradient of ``weight`` from one product.

    Args:
        hidden: ``(..., H)``; float64, float32, bfloat16 or float16. Not modified.
        weight: ``(V, H)``, of the dtype of ``hidden``; with ``group``, this rank's rows of it.
        targets: ``(...)``, or ``(..., K)`` for K tokens per row; int64 or int32, in [0, V).
        bias: ``(V,)``, of the dtype of ``hidden``.
        temperature: divides the (capped) logits.
        softcap: bounds the logits, as Gemma 2 does; before the temperature.
        return_: which results, and in which order: of "logp", "lse", "entropy", "sum_p2" and "sum_p3".
        out_dtype: of the results: float32 or float64.
        chunk_size: tokens of the vocabulary whose logits are in memory at a time.
        group: a process group over whose ranks the vocabulary is cut, each holding consecutive rows of ``weight`` (and
            of ``bias``) in the order of ranks, and all the same ``hidden`` and ``targets``; all get the same results.
        vocab_start: the first of this rank's rows; None: rank times V, for equal parts.

    Returns:
        What ``return_`` names: one tensor if it names one, else a tuple. logp has the shape of ``targets``, the others
        ``(...)``; in nats.

    Raises:
        TypeError: an argument is no dense tensor of its kind, or dtypes differ.
        ValueError: shapes, devices, names or numbers do not fit; on CPU, a target outside [0, V) (with ``group``, of
            no rank), which on CUDA gets logp = NaN.
        RuntimeError: a second derivative is asked for.

    Products of float32 input are in float32 (as torch's settings say), those of 16-bit input are exact with
    sums in float32. Logits are float32, also for 16-bit input: logp is then as accurate as the input allows, about
    1e-5, where 16-bit logits cost up to 0.1. Their gradient is rounded to the dtype of the input for the products of
    the backward pass, whose sums are float32; the gradients are rounded once, and with
    ``weight.grad_dtype = torch.float32`` that of the weight not even that.

    First derivatives, reverse and forward mode: of logp, lse and entropy; those of the moments in forward mode only.
    The bits of a row are those of the product (of float32 and float64 input, and on CUDA, torch's), and depend on
    ``chunk_size``.

    Operations: 2 N H V forward, 6 N H V backward. Memory: N x ``chunk_size`` logits in float32 beside the gradients.

    Merging parts of the vocabulary: :math:`\mathrm{lse} = \log \sum_k e^{\mathrm{lse}_k}`, with
    :math:`w_k = e^{\mathrm{lse}_k - \mathrm{lse}}` the entropy :math:`\sum_k w_k (H_k - \log w_k)` and
    :math:`\sum_k w_k^2 s_k` for sum_p2, in the order of ranks and in float64. Every rank gets the whole gradient of
    ``hidden``, by an all-reduce, whose bits are the process group's.

    Example:
        >>> import torch
        >>> from gradops.rl import linear_logprob
        >>> hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
        >>> linear_logprob(hidden, weight, torch.tensor([2, 1]), return_=("logp", "entropy"))
        (tensor([-0.4076, -0.2395]), tensor([0.8324, 0.6656]))
    """
    _check(hidden, weight, targets, bias, temperature, softcap, return_, out_dtype, chunk_size)
    single = targets.dim() == hidden.dim() - 1
    rows = hidden.shape[:-1]
    n = math.prod(rows)  # numel() would fix a dynamic size
    at = (targets[..., None] if single else targets).long()
    at = at.reshape(n, at.shape[-1])
    if group is not None:
        at = at - (group.rank() * weight.shape[0] if vocab_start is None else vocab_start)
        at = torch.where((at < 0) | (at >= weight.shape[0]), -1, at)
    args = (hidden.reshape(n, hidden.shape[-1]), weight, at, bias, float(temperature), float(softcap or 0),
            "entropy" in return_, "sum_p2" in return_ or "sum_p3" in return_,
            int(chunk_size), group)
    wanted = needs_derivative(hidden, weight, *([] if bias is None else [bias]))
    results = dict(zip(OUTPUTS, (_LinearLogprob.apply if wanted else _forward)(*args), strict=True))
    out = tuple(results[name].reshape(targets.shape if name == "logp" else rows).to(out_dtype) for name in return_)
    return out[0] if len(out) == 1 else out


def _check(hidden: Any, weight: Any, targets: Any, bias: Any, temperature: float, softcap: float | None,
           return_: Sequence[str], out_dtype: torch.dtype, chunk_size: Any) -> None:
    check_linear(hidden, weight, bias)
    check_integers(targets, "targets")
    rows = hidden.shape[:-1]
    if targets.shape != rows and (targets.dim() != hidden.dim() or targets.shape[:-1] != rows):
        raise ValueError(f"targets must have the shape {tuple(rows)}, or that and one dimension more, for hidden of "
                         f"shape {tuple(hidden.shape)}; got {tuple(targets.shape)}")
    check_device(targets, "targets", hidden, "hidden")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    if isinstance(return_, str) or not return_ or any(name not in OUTPUTS for name in return_):
        raise ValueError(f"return_ must be a sequence of names out of {', '.join(OUTPUTS)}, got {return_!r}")
    if out_dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out_dtype must be torch.float32 or torch.float64, got {out_dtype}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")


def _forward(hidden, weight, targets, bias, temperature, softcap, entropy, moments, chunk_size, group):
    out = _op(hidden, weight, targets, bias, temperature, softcap, entropy, moments, group is not None, chunk_size)
    return out if group is None else merge_shards(out, targets, group)


class _LinearLogprob(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        hidden, weight, targets, bias, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.bias = bias is not None
        ctx.wide_weight = weight.is_leaf and getattr(weight, "grad_dtype", None) == torch.float32
        more = (bias,) if ctx.bias else ()
        ctx.save_for_backward(hidden, weight, targets, *output[:3], *more)
        ctx.save_for_forward(hidden, weight, targets, *output[:3], *more)

    @staticmethod
    def backward(ctx: Any, g_logp, g_lse, g_entropy, g_p2, g_p3):
        hidden, weight, targets, logp, lse, entropy, *bias = ctx.saved_tensors
        temperature, softcap, with_entropy, moments, chunk_size, group = ctx.settings
        if moments and (g_p2 is not None or g_p3 is not None):
            raise RuntimeError("linear_logprob: sum_p2 and sum_p3 have no derivative in reverse mode; detach them")
        g_logp = torch.zeros_like(logp) if g_logp is None else g_logp
        g_lse = torch.zeros_like(lse) if g_lse is None else g_lse
        if with_entropy and g_entropy is None:
            g_entropy = torch.zeros_like(lse)
        grads = (g_logp, g_lse, g_entropy if with_entropy else None)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias and ctx.needs_input_grad[3])
        d_hidden, d_weight, d_bias = _Gradient.apply(
            hidden, weight, targets, bias[0] if bias else None, lse, entropy if with_entropy else None, *grads,
            temperature, softcap, *needs, ctx.wide_weight, chunk_size)
        if group is not None and needs[0]:
            whole = d_hidden.to(torch.promote_types(d_hidden.dtype, torch.float32))
            torch.distributed.all_reduce(whole, group=group)
            d_hidden = whole.to(d_hidden.dtype)
        return (d_hidden if needs[0] else None, d_weight if needs[1] else None, None, d_bias if needs[2] else None,
                *[None] * 6)

    @staticmethod
    def jvp(ctx: Any, t_hidden, t_weight, _targets, t_bias, *_):
        hidden, weight, targets, _logp, _lse, _entropy, *bias = primals(ctx.saved_tensors)
        temperature, softcap, with_entropy, moments, _, group = ctx.settings
        if group is not None:
            raise RuntimeError("linear_logprob has no forward-mode derivative with a group")
        return tangents(hidden, weight, targets, bias[0] if bias else None, (t_hidden, t_weight, t_bias), temperature,
                        softcap, with_entropy, moments)


class _Gradient(Function):
    """Stands between the gradient and its own derivative, which is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_):
        raise RuntimeError("linear_logprob has no second derivative")

    @staticmethod
    def jvp(ctx: Any, *_):
        raise RuntimeError("linear_logprob has no second derivative")
