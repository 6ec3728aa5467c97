"""AdamW, for what is not a matrix: norms, biases, scalars."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import MatrixOptimizer, _Item, factor, zeros_like_state


class AdamW(MatrixOptimizer):
    r"""AdamW with the conventions of this family (float32 state for bfloat16 parameters, no host sync).

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow (1 - \eta\lambda)\, p - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    It serves the groups of `SymmetryOptimizer` that are not matrices; on its own `torch.optim.AdamW` is as good.

    Args:
        params: parameters or groups, of any shape.
        lr: learning rate, float or one-element tensor (default 1e-3).
        weight_decay: decoupled weight decay (default 0.01).
        betas: :math:`(\beta_1, \beta_2)` (default (0.9, 0.95)).
        eps: :math:`\epsilon` (default 1e-8).
        state_dtype, maximize: as in `Muon`.

    Source: I. Loshchilov, F. Hutter, arXiv 1711.05101.

    Example:
        >>> import torch
        >>> from gradops.optim import AdamW
        >>> norm = torch.nn.LayerNorm(8)
        >>> opt = AdamW(norm.parameters(), lr=1e-3)
        >>> norm(torch.randn(4, 8)).square().sum().backward()
        >>> opt.step()
    """

    _elementwise = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, locals())

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")

    @classmethod
    def _init_state(cls, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        first = zeros_like_state(param, group)
        return {
            "step": first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32)),
            "exp_avg": first,
            "exp_avg_sq": zeros_like_state(param, group),
        }

    @classmethod
    def _directions(cls, items: list[_Item], grads: list[Tensor]) -> list[Tensor]:
        group = items[0].group
        beta1, beta2 = group["betas"]
        steps, first, second = ([item.state[key] for item in items] for key in ("step", "exp_avg", "exp_avg_sq"))
        one = torch.ones_like(steps[0])  # of a number torch makes a tensor at each use
        torch._foreach_add_(steps, [one] * len(steps))
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, factor(beta2, second))
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        # The step counts are tensors, so that the corrections follow them in a captured graph.
        t = torch.stack(steps)
        correction = one - beta1**t
        root = torch._foreach_sqrt(second)
        torch._foreach_mul_(root, (correction / (one - beta2**t).sqrt()).unbind())
        torch._foreach_add_(root, (correction * group["eps"]).unbind())
        return list(torch._foreach_div(first, root))
