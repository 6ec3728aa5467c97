"""How a parameter is read as a stack of matrices, and written back."""

from __future__ import annotations

from torch import Size, Tensor

LAYOUTS = ("matrix", "flat", "transposed", "heads", "heads_in", "gate_up", "gate_up_interleaved")


def check_layout(layout: object, heads: object) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout in ("heads", "heads_in") and not (isinstance(heads, int) and heads >= 1):
        raise ValueError(f"heads must be a positive int with layout={layout!r}, got {heads!r}")


def check_shape(shape: Size, layout: str, heads: int | None, name: str) -> None:
    """Raises ValueError if a parameter of this shape cannot be read in this layout."""
    if len(shape) < 2:
        raise ValueError(
            f"params: {name} has shape {tuple(shape)}, but matrices (2 or more dimensions) are expected; "
            "give vectors and scalars to AdamW"
        )
    dim, parts = {
        "heads": (-2, heads or 1),
        "heads_in": (-1, heads or 1),
        "gate_up": (-2, 2),
        "gate_up_interleaved": (-1, 2),
    }.get(layout, (-1, 1))
    if shape[dim] % parts:
        raise ValueError(
            f"params: {name} has shape {tuple(shape)}, but layout={layout!r} expects dimension {dim} "
            f"to be a multiple of {parts}"
        )


def to_matrices(x: Tensor, layout: str, heads: int | None = None) -> Tensor:
    """The matrices (..., m, n) that an update sees in a parameter.

    ========================= ======================= =================== =======================================
    layout                    parameter               matrices            meant for
    ========================= ======================= =================== =======================================
    ``"matrix"``              (..., m, n)             as it stands        linear layers, stacks of experts
    ``"flat"``                (m, a, b, ...)          (m, a b ...)        convolutions
    ``"transposed"``          (..., n, m)             (..., m, n)         down projections: rows are neurons
    ``"heads"``               (..., heads k, d)       (..., heads, k, d)  q, k, v (fused too): a matrix per head
    ``"heads_in"``            (..., d, heads k)       (..., heads, d, k)  attention's output projection
    ``"gate_up"``             (..., 2 r, d)           (..., r, 2 d)       fused gate, up: a row per neuron, halves
    ``"gate_up_interleaved"`` (..., d, 2 r)           (..., r, 2 d)       the same, interleaved columns (gpt-oss)
    ========================= ======================= =================== =======================================
    """
    if layout == "matrix":
        return x
    if layout == "flat":
        return x.reshape(x.shape[0], -1)
    if layout == "transposed":
        return x.mT
    if layout == "heads":
        return x.unflatten(-2, (heads, -1))
    if layout == "heads_in":
        return x.unflatten(-1, (heads, -1)).movedim(-2, -3)
    if layout == "gate_up":
        return x.unflatten(-2, (2, -1)).movedim(-3, -2).flatten(-2)
    return x.unflatten(-1, (-1, 2)).movedim(-3, -1).flatten(-2)  # gate_up_interleaved


def from_matrices(x: Tensor, layout: str, shape: Size) -> Tensor:
    """Inverse of `to_matrices`: back to the parameter's shape."""
    if layout == "matrix":
        return x
    if layout in ("flat", "heads"):
        return x.reshape(shape)
    if layout == "transposed":
        return x.mT
    if layout == "heads_in":
        return x.movedim(-3, -2).reshape(shape)
    if layout == "gate_up":
        return x.unflatten(-1, (2, -1)).movedim(-2, -3).reshape(shape)
    return x.unflatten(-1, (2, -1)).movedim(-1, -3).reshape(shape)  # gate_up_interleaved
