"""RowNormM: each row of the momentum at unit length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import linalg
from .base import MatrixOptimizer


class RowNormM(MatrixOptimizer):
    r"""Row-normalised momentum, for matrices whose rows are separate things (tokens, experts, neurons).

    .. math::
        M \leftarrow \beta M + (1 - \beta) G, \qquad \Delta_i = \frac{M_i}{\|M_i\| + \epsilon}, \qquad
        p \leftarrow (1 - \eta\lambda)\, p - \eta \Delta

    With `center`, the mean row is removed from :math:`M` before and from :math:`\Delta` after.

    Args:
        params: parameters or groups, of two or more dimensions; rows lie along the last one.
        lr: learning rate, float or one-element tensor (default 1e-3).
        weight_decay: decoupled weight decay (default 0).
        momentum: :math:`\beta` (default 0.95).
        center: remove the mean row (default False).
        eps: :math:`\epsilon` (default 1e-8), absolute: rows well below it, such as those of tokens not seen for
            long, take no step.
        layout, heads, state_dtype, maximize: as in `Muon`.

    Raises:
        ValueError, TypeError: for settings out of range and parameters that are not real matrices; `step` refuses
            sparse gradients.

    Source: T. Lau, W. Su, arXiv 2605.18106 (mode "inverse_eps" of the authors' code, its default).

    Example:
        >>> import torch
        >>> from gradops.optim import RowNormM
        >>> table = torch.nn.Embedding(32, 8)
        >>> opt = RowNormM(table.parameters(), lr=0.1)
        >>> table(torch.arange(10)).square().sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.0,
        momentum: float = 0.95,
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
    def _kernel(cls, batch: Tensor, group: dict[str, Any], param_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return linalg.row_norm(batch, eps=group["eps"], center=group["center"]), None
