"""The product that compensation is made of, w -= e u. The kernel is for the CPU; on CUDA torch's product does it."""
from torch import Tensor

from .._op import register

_op = register("gptq_spread_", fake=lambda w, e, u, add: None, vmap=False)


def gptq_spread_(w: Tensor, e: Tensor, u: Tensor, add: bool = False) -> None:
    """w: (items, rows, columns), in place; e: (items, rows, depth); u: (items, depth, columns)."""
    if w.device.type == "cpu":
        _op(w, e, u, add)
    else:
        w.baddbmm_(e, u, alpha=1 if add else -1)
