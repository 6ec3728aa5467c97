"""What quantize_model says when it is done."""
from dataclasses import dataclass

from .config import QuantizeConfig


@dataclass(frozen=True)
class ModuleResult:
    """One layer: its name; the method that was used in the end; the tokens it saw; ``loss`` as in
    :func:`gptq_quantize`, summed over rows; the share of the mean diagonal that was added to its Hessian, NaN without
    one; seconds, with those of calibration, shared equally in its stage; ``info`` as in :func:`gptq_quantize`; and
    ``note``, why it was rounded to nearest if it was not meant to be."""

    name: str
    method: str
    tokens: int
    loss: float
    damp: float
    seconds: float
    info: int
    note: str = ""


@dataclass(frozen=True)
class QuantizeReport:
    """The result of :func:`quantize_model`. ``modules``: a :class:`ModuleResult` per layer, in the order in which they
    were quantised; ``left``: what was left alone, and why; ``seconds`` in all. As a string, a table."""

    config: QuantizeConfig
    modules: list[ModuleResult]
    left: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        head = ("layer", "method", "tokens", "loss", "damping", "seconds", "info")
        rows = [(r.name, r.method, str(r.tokens), f"{r.loss:.4g}", f"{r.damp:.3g}", f"{r.seconds:.2f}",
                 f"{r.info} {r.note}".rstrip()) for r in self.modules]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines = ["  ".join(c.ljust(w) if i in (0, 1, 6) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
                 for row in (head, *rows)]  # fmt: skip
        lines += [f"left alone: {name}: {why}" for name, why in self.left.items()]
        lines.append(f"{len(rows)} layers, {self.config.bits} bits, {self.seconds:.1f} s")
        return "\n".join(line.rstrip() for line in lines)
