"""How a whole model is quantised: one frozen dataclass."""
from dataclasses import dataclass

from .._checks import check_one_of
from ._columns import METHODS
from .gptq_pack import BITS, FORMATS


@dataclass(frozen=True)
class QuantizeConfig:
    """What :func:`quantize_model` does to every linear layer; fields as in :func:`gptq_quantize` if not told.

    Args:
        bits: 2, 3, 4 or 8: what checkpoints hold.
        group_size: inputs that share a scale; -1: all of them.
        sym: zero points are ``2^(bits-1)``; otherwise ``checkpoint_format="gptq_v2"`` is needed, because ``"gptq"``
            cannot hold a zero point of 0.
        method: ``"gptq"``, ``"gptaq"``, ``"foem"``, ``"foem+gptaq"``, or ``"rtn"``: rounding, which needs no
            calibration. GPTAQ keeps a second, full-precision copy of one block and of its inputs.
        desc_act, act_group_aware, static_groups: the order of the columns, and when scales are chosen.
        mse, alpha, beta, damp_percent: as in :func:`gptq_quantize`.
        damp_auto_increment: added to ``damp_percent``, up to 1, where a Hessian is not positive definite.
        min_token_share: a layer that saw a smaller share of the calibration tokens (an expert that is seldom chosen)
            is rounded to nearest.
        skip: layers to leave as they are: patterns of :func:`fnmatch.fnmatch` on their names. By default the routers of
            mixtures of experts, which deployment reads in full precision.
        checkpoint_format: ``"gptq"`` or ``"gptq_v2"``, as in :func:`pack_gptq`.

    Example:
        >>> from gradops.quant import QuantizeConfig
        >>> QuantizeConfig(bits=3, method="foem", desc_act=True).group_size
        128
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    method: str = "gptq"
    desc_act: bool = False
    act_group_aware: bool = False
    static_groups: bool = False
    mse: float = 0.0
    alpha: float = 0.25
    beta: float = 0.2
    damp_percent: float = 0.01
    damp_auto_increment: float = 0.01
    min_token_share: float = 0.005
    skip: tuple[str, ...] = ("*.gate", "*.router", "*.shared_expert_gate")
    checkpoint_format: str = "gptq"

    def __post_init__(self) -> None:
        check_one_of(self.bits, "bits", BITS)
        check_one_of(self.method, "method", ("rtn", *METHODS))
        check_one_of(self.checkpoint_format, "checkpoint_format", FORMATS)
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be positive, or -1 for whole rows, got {self.group_size}")
        for name in ("damp_percent", "damp_auto_increment", "min_token_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        if not self.mse >= 0:
            raise ValueError(f"mse must be 0 or the exponent of the error, got {self.mse}")
        if self.desc_act and self.act_group_aware:
            raise ValueError("desc_act and act_group_aware are two orders of the columns, got both")
        if not self.sym and self.checkpoint_format == "gptq":
            raise ValueError("sym=False needs checkpoint_format='gptq_v2': 'gptq' cannot hold a zero point of 0")
        if isinstance(self.skip, str):
            raise TypeError(f"skip must be a tuple of patterns, got the string {self.skip!r}")
