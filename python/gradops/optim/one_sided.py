"""RightPolarGradM and LeftPolarGradM: spectral updates for matrices whose two sides have different symmetry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import linalg
from .base import MatrixOptimizer, check_positive_eps


class _OneSidedPolarGradM(MatrixOptimizer):
    _side = "right"

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_positive_eps(group)

    @classmethod
    def _kernel(cls, batch: Tensor, group: dict[str, Any], param_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        step = linalg.one_sided_polar(
            batch, side=cls._side, alpha=group["alpha"], center=group["center"], eps=group["eps"]
        )
        return step, None


class RightPolarGradM(_OneSidedPolarGradM):
    r"""Right-spectral update, for matrices whose rows are permuted and whose columns are rotated (embeddings).

    .. math::
        M \leftarrow \beta M + (1 - \beta) G, \quad u = M (M^\top M + \epsilon I)^{-1/2}, \quad
        \Delta = \max(\langle M, u \rangle, \epsilon)^\alpha\, u, \quad p \leftarrow (1 - \eta\lambda)\, p - \eta \Delta

    With `center`, the mean row is removed from :math:`M` before and from :math:`\Delta` after (LM heads, whose
    logits may be shifted together).

    Args:
        params: parameters or groups, of two or more dimensions.
        lr: learning rate, float or one-element tensor (default 1e-3).
        weight_decay: decoupled weight decay (default 0).
        momentum: :math:`\beta` (default 0.95).
        alpha: exponent of the nuclear-norm scale: 1 as PolarGrad, 0 as Muon (default 1).
        center: remove the mean row (default False).
        eps: :math:`\epsilon` (default 1e-8). It is absolute, as in the paper: gradients well below its root vanish.
        layout, heads, state_dtype, maximize: as in `Muon`.

    Raises:
        ValueError, TypeError: for settings out of range and parameters that are not real matrices; `step` refuses
            sparse gradients.

    Source: T. Lau, W. Su, arXiv 2605.18106. In a stack of experts each has its own scale, where the authors' code
    sums it over the stack and so couples them.

    Example:
        >>> import torch
        >>> from gradops.optim import RightPolarGradM
        >>> table = torch.nn.Embedding(32, 8)
        >>> opt = RightPolarGradM(table.parameters(), lr=0.1)
        >>> table(torch.arange(10)).square().sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.0,
        momentum: float = 0.95,
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


class LeftPolarGradM(_OneSidedPolarGradM):
    r"""Left-spectral update, :math:`u = (M M^\top + \epsilon I)^{-1/2} M`; the paper's choice for MoE routers.

    It is the same matrix as the right-spectral u: the two are named after the symmetry they respect. Everything is as
    in `RightPolarGradM`, but `center` is on by default, because a router's logits may be shifted together.

    Example:
        >>> import torch
        >>> from gradops.optim import LeftPolarGradM
        >>> router = torch.nn.Linear(16, 4, bias=False)
        >>> opt = LeftPolarGradM(router.parameters(), lr=0.1)
        >>> router(torch.randn(8, 16)).square().sum().backward()
        >>> opt.step()
    """

    _side = "left"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.0,
        momentum: float = 0.95,
        alpha: float = 1.0,
        center: bool = True,
        eps: float = 1e-8,
        *,
        layout: str = "matrix",
        heads: int | None = None,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, locals())
