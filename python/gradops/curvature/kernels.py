"""A context in which an ordinary model uses the operations of this family."""
from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .cross_entropy import cross_entropy
from .layer_norm import layer_norm, rms_norm
from .scaled_dot_product_attention import scaled_dot_product_attention
from .swiglu import swiglu


def second_order_kernels() -> Any:
    r"""A context in which torch's functions are this family's, so that a model needs no edit for second derivatives.

    For its duration, and in its thread, these functions of :mod:`torch.nn.functional` are those of
    :mod:`gradops.curvature`, whoever calls them: ``scaled_dot_product_attention``, ``rms_norm``, ``layer_norm``,
    ``cross_entropy``, ``silu``. So :class:`torch.nn.RMSNorm`, :class:`torch.nn.LayerNorm`, :class:`torch.nn.SiLU`,
    :class:`torch.nn.CrossEntropyLoss`, :class:`torch.nn.MultiheadAttention` with ``need_weights=False`` and
    :class:`torch.nn.TransformerEncoderLayer` use them, and models of Hugging Face with
    ``attn_implementation="sdpa"`` (a norm that a model writes in plain torch stays as it is).

    A call that the operation here does not take goes to torch unchanged: dropout in attention, a mask that requires
    grad, norms over several dimensions, class weights, probabilities as targets, the deprecated arguments of losses,
    ``silu(inplace=True)``, integers, complex numbers and tensors of other kinds, anything under autocast, and every
    call with a wrong argument, so that the errors are torch's.

    Results are kept for the backward pass: a model that writes over one in place gets torch's error about it. What
    counts is where the function is called, not where it is differentiated: the backward pass may come after. In
    :func:`torch.func` transforms and :func:`torch.compile` it works as outside of them.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from gradops.curvature import hvp, second_order_kernels
        >>> q = torch.eye(2)[None]
        >>> with second_order_kernels():  # torch's fused attention has no second derivative
        ...     _, Hq = hvp(lambda q: F.scaled_dot_product_attention(q, q, q).square().sum(), q, q)
        >>> Hq.shape
        torch.Size([1, 2, 2])
    """
    return _SecondOrderKernels()


def is_active() -> bool:
    return any(isinstance(mode, _SecondOrderKernels) for mode in _get_current_function_mode_stack())


class _SecondOrderKernels(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OURS:
            try:  # the operations check their arguments before any work
                out = _OURS[func](*args, **kwargs)
            except (TypeError, ValueError):
                out = None
            if out is not None:
                return out
        if func is F.multi_head_attention_forward:
            with self:
                return multi_head_attention_forward(*args, **kwargs)
        return func(*args, **kwargs)


# Torch's own function, whose calls can be seen from a mode: it does not ask for the mode itself once more.
multi_head_attention_forward: Callable[..., Any] = types.FunctionType(
    F.multi_head_attention_forward.__code__, {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__)  # fmt: skip


# Torch's signatures. None: torch's function is to do it.
def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Tensor | None:
    if _autocast(query) or (attn_mask is not None and attn_mask.requires_grad):
        return None
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                        enable_gqa=enable_gqa)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    if _autocast(input) or len(normalized_shape) != 1 or normalized_shape[0] != input.shape[-1]:
        return None
    if eps is None:  # torch's, which is not that of its documentation for bfloat16 and float16
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    return rms_norm(input, weight, eps)


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5) -> Tensor | None:
    if _autocast(input) or len(normalized_shape) != 1 or normalized_shape[0] != input.shape[-1]:
        return None
    return layer_norm(input, weight, bias, eps)


def _cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None,
                   ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
                   label_smoothing: float = 0.0) -> Tensor | None:
    if _autocast(input) or weight is not None or size_average is not None or reduce is not None:
        return None
    return cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)


def _silu(input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else swiglu(input)


def _autocast(t: Tensor) -> bool:
    return torch.is_autocast_enabled(t.device.type)


_OURS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention, F.rms_norm: _rms_norm, F.layer_norm: _layer_norm,
    F.cross_entropy: _cross_entropy, F.silu: _silu,
}  # fmt: skip
