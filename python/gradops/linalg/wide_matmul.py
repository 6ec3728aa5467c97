"""Products of matrices of any dtype into a matrix that may be wider. The kernel is for the CPU; CUDA has torch's."""
import torch
from torch import Tensor

from .._op import register

_op = register("wide_matmul_", fake=lambda *_: None, vmap=False)


def wide_matmul_(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out = left @ right, or out += left @ right, with sums in float32 or wider, for dense matrices without gradients.

    Of 16-bit matrices ``out`` may be float32, which torch's products on CPU cannot do; and where it is not, it is
    rounded once. ``left`` may be float32 beside a ``right`` of 16 bits, to which the product may round it.
    """
    if right.dtype in (torch.float32, torch.float64):
        torch.mm(left, right, out=out) if not add else out.addmm_(left, right)
    elif right.is_cpu:
        _op(out, left, right, add)
    elif out.dtype == right.dtype:
        torch.mm(left.to(right.dtype), right, out=out)
    elif add:
        torch.addmm(out, left.to(right.dtype), right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(right.dtype), right, out_dtype=out.dtype, out=out)
