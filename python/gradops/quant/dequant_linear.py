"""The product with a GPTQ checkpoint's weight, read as it is packed."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_one_of, check_tensor
from .._op import refuse_derivative
from .gptq_pack import BITS, FORMATS
from .reference import dequant_linear as _reference


@torch.compiler.allow_in_graph
def dequant_linear(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None = None,
                   bias: Tensor | None = None, *, bits: int, group_size: int = -1,
                   checkpoint_format: str = "gptq") -> Tensor:
    r"""A linear layer whose weight is in the packed form of GPTQ checkpoints.

    .. math::
        y_j = b_j + \sum_i x_i \, s_{g_i j} \, (q_{ij} - z_{g_i j})

    The weight is unpacked in registers: what is read is the packed words.

    Args:
        x: ``(..., in)``; float32, bfloat16, float16 or float64. Not modified.
        qweight: int32 ``(ceil(in bits / 32), out)``, as :func:`pack_gptq` makes it.
        scales: ``(groups, out)``, any floating dtype.
        qzeros: int32 ``(groups, ceil(out bits / 32))``.
        g_idx: int32 ``(in,)``, the group of each input, in any order. None: ``group_size`` inputs after each other.
        bias: ``(out,)``, any floating dtype.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group where ``g_idx`` is None; -1: all are one group.
        checkpoint_format: ``"gptq"``, where zero points are stored less one, or ``"gptq_v2"``.

    Returns:
        ``(..., out)``, in the dtype of ``x``.

    Raises:
        TypeError: an argument is no dense tensor of its kind.
        ValueError: shapes, devices or names do not fit; on CPU, a group that is not there.
        RuntimeError: a derivative in anything but ``x`` is asked for.
    """
    check_floating(x, "x")
    if x.dim() < 1:
        raise ValueError("x must have at least 1 dimension (..., in), got a number")
    check_one_of(bits, "bits", BITS)
    check_one_of(checkpoint_format, "checkpoint_format", FORMATS)
    _check_packed(x, qweight, scales, qzeros, g_idx, bias, bits, group_size)
    refuse_derivative("dequant_linear", scales=scales, bias=bias)
    return _reference(x, qweight, scales, qzeros, g_idx, bias, bits=bits, group_size=group_size,
                      checkpoint_format=checkpoint_format)


def _check_packed(x: Tensor, qweight: Any, scales: Any, qzeros: Any, g_idx: Any, bias: Any, bits: int,
                  group_size: int) -> None:
    for t, name in ((qweight, "qweight"), (qzeros, "qzeros"), (g_idx, "g_idx")):
        if t is None and name == "g_idx":
            continue
        check_tensor(t, name)
        if t.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {t.dtype}")
        check_device(t, name, x, "x")
    for t, name in ((scales, "scales"), (bias, "bias")):
        if t is None and name == "bias":
            continue
        check_floating(t, name)
        check_device(t, name, x, "x")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size must be positive, or -1 for all inputs, got {group_size}")
    if scales.dim() != 2:
        raise ValueError(f"scales must have shape (groups, out), got {tuple(scales.shape)}")
    n, (groups, out) = x.shape[-1], scales.shape
    if g_idx is None and groups != -(-n // (group_size if group_size > 0 else max(n, 1))):
        raise ValueError(f"scales must have a row for each group of {group_size} of {n} inputs, got {groups} rows")
    for t, name, want in ((qweight, "qweight", ((n * bits + 31) // 32, out)),
                          (qzeros, "qzeros", (groups, (out * bits + 31) // 32)),
                          (g_idx, "g_idx", (n,)), (bias, "bias", (out,))):
        if t is not None and tuple(t.shape) != want:
            raise ValueError(f"{name} must have shape {want} for x of {n} inputs, scales of {tuple(scales.shape)} and "
                             f"bits={bits}, got {tuple(t.shape)}")
