"""What is made of each eigenvalue of a Gram matrix; the same for tensors and for NumPy's arrays."""
from typing import Any

from .._checks import check_number

FILTERS = ("hard", "tikhonov", "smooth")


def check_filter(k: int | None, rtol: float, atol: float = 0.0, filter: str = "hard", damping: float = 0.0,
                 power: float = 1.0) -> None:
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 0):
        raise ValueError(f"k must be None or an integer >= 0, got {k!r}")
    check_number(rtol, "rtol")
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}")
    for name, value in (("atol", atol), ("damping", damping), ("power", power)):
        check_number(value, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if filter not in FILTERS:
        raise ValueError(f"filter must be one of {', '.join(map(repr, FILTERS))}, got {filter!r}")


def factors(xp: Any, values: Any, k: int, rtol: float, atol: float, filter: str, damping: float, power: float
            ) -> tuple[Any, Any, Any]:
    """Square roots, factors and which ones are above the hard filter's cut, of eigenvalues >= 0 in falling order.

    xp: torch or numpy. k: -1 for all.
    """
    sigma = xp.sqrt(values)
    kept = sigma > xp.clip(rtol * sigma[..., :1], atol, None)
    used = kept if filter == "hard" else sigma > atol if filter == "smooth" else values + damping > 0
    if k >= 0:
        kept[..., k:] = False
        used[..., k:] = False
    if power != 1:
        used = used & (values > 0)
    safe = xp.where(used, values, xp.ones_like(values))  # torch takes long to make a tensor of a number
    factor = used / (safe + damping if damping else safe)
    if filter == "smooth":
        factor = factor / (1 + (rtol**2 * values[..., :1] / safe) ** 6)
    return sigma, factor if power == 1 else factor * safe ** ((1 - power) / 2), kept


def gram_suffices(rtol: float, double: bool) -> bool:
    """Whether the Gram matrix in float64 shows singular values down to rtol of the largest as well as pinv_apply
    promises. Squared, they are known to about 1e-16 of the largest squared, which the gap between the last one kept
    and the first one cut magnifies: of neighbours 3 % apart the update is known to about 1e-15 / rtol^2."""
    return rtol >= (1e-2 if double else 1e-7)
