"""Coefficients (a, b, c) of X <- a X + (b A + c A^2) X, A = X X^T, by the names under which people know them."""
import functools
from collections.abc import Sequence

Coefficients = tuple[tuple[float, float, float], ...]

_SIMPLE = (3.4445, -4.7750, 2.0315)  # K. Jordan's Muon; torch.optim.Muon's default
_POLAR_EXPRESS = (  # Amsel et al., arXiv 2505.16932, Algorithm 1, before the safety factor
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_QUINTIC = (  # J. You's list, tuned step by step (modded-nanogpt)
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_CANS = (  # Chebyshev-optimised, arXiv 2506.10935
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
_AOL = (  # for input rescaled by almost-orthogonal-layer row weights (Turbo-Muon), four steps
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)
_CUBIC5 = (  # no A^2 term: one product fewer per step
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)
_SAFETY = 1.01  # keeps singular values rounded above 1 inside the interval the polynomials were made for

NAMES = ("polar_express", "simple", "quintic", "cans", "aol", "deepseekv4", "cubic5")


def _safe(table: Coefficients, factor: float) -> Coefficients:
    """The same polynomials of x / factor."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in table)


def with_margin(table: Coefficients, eps: float) -> Coefficients:
    """The same steps for input divided by (1 + eps) first."""
    return _safe(table[:1], 1 + eps) + table[1:]


def resolve(coefficients: str | Sequence[Sequence[float]], steps: int) -> Coefficients:
    """One (a, b, c) per step; the last of a shorter list repeats."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps must be an int, got {type(steps).__name__}")
    if not 1 <= steps <= 32:
        raise ValueError(f"steps must be between 1 and 32, got {steps}")
    table = _table(coefficients, steps)
    return (table + table[-1:] * steps)[:steps]


def _table(coefficients: str | Sequence[Sequence[float]], steps: int) -> Coefficients:
    if isinstance(coefficients, str):
        return _named(coefficients, steps)
    try:
        table = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError):
        raise TypeError("coefficients must be a name or a sequence of (a, b, c), one per step, "
                        f"got {coefficients!r}") from None
    if not 1 <= len(table) <= steps:
        raise ValueError(f"coefficients must hold between 1 and steps = {steps} triples, got {len(table)}")
    return table


@functools.cache
def _named(coefficients: str, steps: int) -> Coefficients:
    match coefficients:
        case "polar_express":  # the paper divides by the factor once more in front: ||x|| * 1.01
            table = _safe(_POLAR_EXPRESS[:-1], _SAFETY) + _POLAR_EXPRESS[-1:]
            return _safe(table[:1], _SAFETY) + table[1:]
        case "simple":
            return (_SIMPLE,)
        case "quintic":
            return _QUINTIC
        case "cans":  # as published it overshoots in bfloat16
            return _safe(_CANS, _SAFETY)
        case "aol":
            return _AOL
        case "deepseekv4":  # `simple`, then two steps that converge to 1
            return (_SIMPLE,) * max(steps - 2, 0) + ((2.0, -1.5, 0.5),) * 2
        case "cubic5":
            return _CUBIC5
    raise ValueError(f"coefficients must be one of {', '.join(NAMES)} or a sequence of (a, b, c), "
                     f"got {coefficients!r}")
