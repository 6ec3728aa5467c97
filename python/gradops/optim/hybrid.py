"""HybridPolarGradM: row normalisation and a one-sided polar factor, in either order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import linalg
from .base import MatrixOptimizer, check_positive_eps


class HybridPolarGradM(MatrixOptimizer):
    r"""Row normalisation and a one-sided polar factor of the momentum, in either order.

    .. math::
        M &\leftarrow \beta M + (1 - \beta) G, \qquad p \leftarrow (1 - \eta\lambda)\, p - \eta \Delta \\
        \text{row\_then\_polar:}\quad W &= \mathrm{rownorm}(M), \quad
            u = W (W^\top W + \epsilon I)^{-1/2}, \quad \Delta = \max(\langle W, u\rangle, \epsilon)^\alpha\, u \\
        \text{polar\_then\_row:}\quad u &= M (M^\top M + \epsilon I)^{-1/2}, \quad
            \Delta = \mathrm{rownorm}(\max(\langle M, u\rangle, \epsilon)^\alpha\, u)

    (in the second the scale cancels, up to eps). `side="left"` names :math:`(W W^\top + \epsilon I)^{-1/2} W`, which is
    the same matrix; `center` removes the mean row before and after each of the two.

    Args:
        params: parameters or groups, of two or more dimensions.
        lr: learning rate, float or one-element tensor (default 1e-3).
        weight_decay: decoupled weight decay (default 0).
        momentum: :math:`\beta` (default 0.95).
        order: "row_then_polar" (default) or "polar_then_row".
        side: "right" (default) or "left".
        alpha: exponent of the nuclear-norm scale (default 1). Rows of unit length make that scale large, up to
            :math:`\sqrt{m \min(m, n)}`: choose lr accordingly, or 0.
        center: remove the mean row (default False).
        eps: :math:`\epsilon` (default 1e-8).
        layout, heads, state_dtype, maximize: as in `Muon`. Layouts "transposed" (down projections) and "gate_up" let
            rows be neurons.

    Raises:
        ValueError, TypeError: for settings out of range and parameters that are not real matrices; `step` refuses
            sparse gradients.

    Source: T. Lau, W. Su, arXiv 2605.18106. The authors' class defaults to polar_then_row, their training scripts to
    row_then_polar; in a stack of experts they sum the scale over the stack, here each has its own.

    Example:
        >>> import torch
        >>> from gradops.optim import HybridPolarGradM
        >>> up = torch.nn.Linear(16, 64, bias=False)
        >>> opt = HybridPolarGradM(up.parameters(), lr=0.02, alpha=0.0)
        >>> up(torch.randn(8, 16)).square().sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.0,
        momentum: float = 0.95,
        order: str = "row_then_polar",
        side: str = "right",
        alpha: float = 1.0,
        center: bool = False,
        eps: float = 1e-8,
        *,
        layout: str = "matrix",
        heads: int | None = None,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, locals())

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        if group["order"] not in ("row_then_polar", "polar_then_row"):
            raise ValueError(f"order must be 'row_then_polar' or 'polar_then_row', got {group['order']!r}")
        if group["side"] not in ("right", "left"):
            raise ValueError(f"side must be 'right' or 'left', got {group['side']!r}")
        check_positive_eps(group)

    @classmethod
    def _kernel(cls, batch: Tensor, group: dict[str, Any], param_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        eps, center = group["eps"], group["center"]

        def polar(x: Tensor) -> Tensor:
            return linalg.one_sided_polar(x, side=group["side"], alpha=group["alpha"], center=center, eps=eps)

        if group["order"] == "row_then_polar":
            return polar(linalg.row_norm(batch, eps=eps, center=center)), None
        return linalg.row_norm(polar(batch), eps=eps, center=center), None
