"""silu(gate) * up as it is written."""
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    y = gate * gate.sigmoid()
    return y if up is None else y * up
