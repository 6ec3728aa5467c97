"""Checks that public functions share; each error names the argument, what it was and what is expected."""
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(x: Any, name: str) -> None:
    """x must be a dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def check_floating(x: Any, name: str) -> None:
    """x must be a dense real floating-point tensor."""
    check_tensor(x, name)
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")


def check_matrix(x: Any, name: str) -> None:
    """x must be a dense real floating-point tensor (..., m, n)."""
    check_floating(x, name)
    if x.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (..., m, n), got shape {tuple(x.shape)}")


def check_number(x: Any, name: str) -> None:
    """x must be a real number."""
    if not isinstance(x, (float, int, Real)):  # of an abstract class alone it takes longer to tell
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")


def check_count(n: Any, name: str) -> None:
    """n must be a positive whole number."""
    if not isinstance(n, (int, Integral)) or isinstance(n, bool) or n < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {n!r}")


def check_integers(x: Any, name: str) -> None:
    """x must be a dense int32 or int64 tensor."""
    check_tensor(x, name)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")


def check_like(x: Any, name: str, y: Tensor, other: str) -> None:
    """x must be a tensor with the shape and the device of y, the argument `other`."""
    check_tensor(x, name)
    if x.shape != y.shape:
        raise ValueError(f"{name} must have the shape of {other}, {tuple(y.shape)}, got {tuple(x.shape)}")
    check_device(x, name, y, other)


def check_device(x: Tensor, name: str, y: Tensor, other: str) -> None:
    if x.device != y.device:
        raise ValueError(f"{name} must be on the device of {other}, {y.device}, got {x.device}")


def may_look(x: Tensor) -> bool:
    """Whether looking at x's numbers costs no wait and breaks neither a compiler's graph nor a transform."""
    return x.is_cpu and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_linear(hidden: Any, weight: Any, bias: Any, name: str = "hidden", weight_name: str = "weight") -> None:
    """The inputs of a linear layer: hidden (..., H), weight (V, H) with V > 0 and, if it is not None, bias (V,)."""
    check_floating(hidden, name)
    if hidden.dim() < 1:
        raise ValueError(f"{name} must have at least 1 dimension (..., H), got shape ()")
    check_floating(weight, weight_name)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{weight_name} must have the shape (V, {hidden.shape[-1]}), V > 0, for {name} of shape "
                         f"{tuple(hidden.shape)}; got {tuple(weight.shape)}")
    if bias is not None:
        check_floating(bias, "bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have the shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for x, other in ((weight, weight_name), (bias, "bias")):
        if x is None:
            continue
        check_device(x, other, hidden, name)
        if x.dtype != hidden.dtype:
            raise TypeError(f"{other} must have the dtype of {name}, {hidden.dtype}, got {x.dtype}")


def check_ids(ids: Tensor, name: str, n: int) -> None:
    """ids, if they may be looked at, must be in [0, n). For what is made of torch's operations; ours check inside."""
    if may_look(ids) and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"{name} must be in [0, {n}), got {low if low < 0 else high}")


def check_rising(offsets: Tensor, name: str, n: int) -> None:
    """Offsets, if they may be looked at, must rise from 0 to n. For what is made of torch's operations."""
    if may_look(offsets) and (offsets[0] != 0 or offsets[-1] != n or (offsets.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to {n}, got {offsets.tolist()}")


def check_one_of(x: Any, name: str, choices: tuple[Any, ...]) -> None:
    if x not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {x!r}")
