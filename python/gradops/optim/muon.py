"""Muon: the momentum, orthogonalised by Newton-Schulz iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import linalg
from .base import MatrixOptimizer


class Muon(MatrixOptimizer):
    r"""Muon: steps along the orthogonalised momentum.

    .. math::
        M \leftarrow \beta M + (1 - \beta) G, \qquad
        U = \mathrm{NS}\big((1 - \beta) G + \beta M\big), \qquad
        p \leftarrow (1 - \eta\lambda)\, p - \eta\, r\, U

    (without `nesterov`, :math:`U = \mathrm{NS}(M)`), where :math:`r` is :math:`\sqrt{\max(1, m/n)}` or
    :math:`0.2 \sqrt{\max(m, n)}` for an (m, n) matrix. A drop-in for `torch.optim.Muon`: same names, formulas and
    checkpoints. It differs in that parameters of one shape share a batched kernel call; float32 parameters are
    computed in float32, as torch is set to multiply it, rather than always in bfloat16; the state of
    bfloat16 parameters is float32; stacks of matrices (3 dimensions and more) are accepted; and the default
    polynomial is Polar Express. `ns_coefficients="simple"` with `precision="medium"` is torch's numerics.

    Args:
        params: parameters or groups, of two or more dimensions: (..., m, n), each (m, n) a matrix of its own.
        lr: learning rate, float or one-element tensor (default 1e-3).
        weight_decay: decoupled weight decay (default 0.1).
        momentum: :math:`\beta` (default 0.95).
        nesterov: Nesterov momentum (default True).
        ns_coefficients: `coefficients` of `gradops.linalg.newton_schulz`: a name ("polar_express", "simple",
            "quintic", ...), one triple (a, b, c), or one triple per step.
        eps: relative safety margin of the norm that the momentum is divided by; the step does not depend on the
            gradient's scale.
        ns_steps: number of Newton-Schulz steps (default 5).
        adjust_lr_fn: "original" or None: :math:`\sqrt{\max(1, m/n)}` (Keller Jordan); "match_rms_adamw":
            :math:`0.2\sqrt{\max(m, n)}` (Liu et al., arXiv 2502.16982, section 2.2).
        precision: of float32 products: "highest", "high", "medium" (bfloat16), or None: bfloat16 for bfloat16
            parameters, else what torch is set to, as in `gradops.linalg.newton_schulz`.
        layout: how matrices are read from a parameter, see `gradops.optim.to_matrices`; "flat" for convolutions.
        heads: number of heads, for layouts "heads" and "heads_in".
        state_dtype: dtype of the momentum; by default the parameter's, but at least float32.
        maximize: maximise the objective.

    Raises:
        ValueError, TypeError: for settings out of range and parameters that are not real matrices; `step` refuses
            sparse gradients.

    Source: K. Jordan et al., Muon (2024); N. Amsel et al., The Polar Express, arXiv 2505.16932.

    Example:
        >>> import torch
        >>> from gradops.optim import Muon
        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> opt = Muon(layer.parameters(), lr=0.02)
        >>> layer(torch.randn(4, 16)).square().mean().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "polar_express",
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        precision: str | None = None,
        layout: str = "matrix",
        heads: int | None = None,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, locals())

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        if not isinstance(group["ns_steps"], int) or group["ns_steps"] < 1:
            raise ValueError(f"ns_steps must be an int >= 1, got {group['ns_steps']!r}")
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(
                f"adjust_lr_fn must be None, 'original' or 'match_rms_adamw', got {group['adjust_lr_fn']!r}"
            )
        # The kernel knows the names and shapes of coefficients: let it judge, on the smallest matrix.
        _newton_schulz(torch.zeros(1, 1, device="cpu"), group, torch.float32)

    @classmethod
    def _kernel(cls, batch: Tensor, group: dict[str, Any], param_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        u = _newton_schulz(batch, group, param_dtype)
        m, n = batch.shape[-2:]
        if group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(m, n))
        else:
            ratio = math.sqrt(max(1, m / n))
        return (u if ratio == 1 else u.mul_(ratio)), None


def _newton_schulz(x: Tensor, group: dict[str, Any], param_dtype: torch.dtype) -> Tensor:
    coefficients = group["ns_coefficients"]
    if not isinstance(coefficients, str) and len(coefficients) == 3 and not isinstance(coefficients[0], Sequence):
        coefficients = [coefficients]
    precision = group["precision"] or ("medium" if param_dtype == torch.bfloat16 else None)
    return linalg.newton_schulz(
        x, group["ns_steps"], coefficients=coefficients, eps=group["eps"], precision=precision
    )
