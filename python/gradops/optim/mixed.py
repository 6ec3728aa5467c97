"""SymmetryOptimizer: one optimizer, an update per parameter group."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adamw import AdamW
from .base import MatrixOptimizer
from .hybrid import HybridPolarGradM
from .muon import Muon
from .one_sided import LeftPolarGradM, RightPolarGradM
from .polargrad import PolarGrad
from .row_norm import RowNormM

UPDATES: dict[str, type[MatrixOptimizer]] = {
    "muon": Muon,
    "polargrad": PolarGrad,
    "right_polar": RightPolarGradM,
    "left_polar": LeftPolarGradM,
    "row_norm": RowNormM,
    "hybrid": HybridPolarGradM,
    "adamw": AdamW,
}


class SymmetryOptimizer(MatrixOptimizer):
    """Runs parameter groups that each name their update, as `symmetry_param_groups` makes them.

    A group takes `update` and the settings of the class of that name: "muon" (`Muon`), "polargrad" (`PolarGrad`),
    "right_polar" (`RightPolarGradM`), "left_polar" (`LeftPolarGradM`), "row_norm" (`RowNormM`), "hybrid"
    (`HybridPolarGradM`), "adamw" (`AdamW`). One `state_dict` and one learning-rate scheduler serve them all.

    Args:
        params: parameters or groups.
        lr: learning rate of groups that name none; by default that of their update's class.
        weight_decay: likewise.
        update: update of groups that name none (default "muon").

    Raises:
        ValueError, TypeError: for an unknown update, an unknown setting, and as the update's class does.

    Example:
        >>> import torch
        >>> from gradops.optim import SymmetryOptimizer
        >>> layer = torch.nn.Linear(16, 8)
        >>> opt = SymmetryOptimizer([
        ...     {"params": [layer.weight], "update": "muon", "lr": 0.02},
        ...     {"params": [layer.bias], "update": "adamw", "lr": 1e-3},
        ... ])
        >>> layer(torch.randn(4, 16)).square().mean().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        weight_decay: float | Tensor | None = None,
        update: str = "muon",
    ) -> None:
        super().__init__(params, {"update": update} | _given(lr=lr, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rule = self._rule({"update": self.defaults["update"]} | param_group)
        known = {"params", "param_names", "update", "role", *rule._defaults}
        if unknown := sorted(set(param_group) - known):
            raise ValueError(
                f"params: a group with update={param_group.get('update', self.defaults['update'])!r} has no setting "
                f"{', '.join(map(repr, unknown))}; {rule.__name__} takes {', '.join(rule._defaults)}"
            )
        super().add_param_group(param_group)

    def _rule(self, group: dict[str, Any]) -> type[MatrixOptimizer]:
        if group["update"] not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {group['update']!r}")
        return UPDATES[group["update"]]


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
