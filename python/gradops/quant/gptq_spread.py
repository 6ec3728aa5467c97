"""The product that compensation is made of, w -= e u. The kernel is for the CPU; on CUDA torch's product does it."""
from torch import Tensor

from .._op import register

_op = register("gptq_spread_", fake=lambda *_: None, vmap=False)


def gptq_spread_(w: Tensor, e: Tensor, u: Tensor, add: bool = False, fresh: bool = False,
                 base: Tensor | None = None) -> None:
    """w: (items, rows, columns), in place; e: (items, rows, depth); u: (items, depth, columns). `fresh` takes what w
    holds for 0; `base` is added to the sum."""
    if w.device.type == "cpu":
        _op(w, e, u, add, fresh, base)
        return
    w.baddbmm_(e, u, beta=0 if fresh else 1, alpha=1 if add else -1)
    if base is not None:
        w += base
