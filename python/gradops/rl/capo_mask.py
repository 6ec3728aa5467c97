"""Which tokens CAPO keeps."""
import torch
from torch import Tensor

from .._checks import check_floating, check_like, check_one_of

_PRESETS = {"capo": (1e-2, 1e-4), "dr_capo": (5e-4, 1e-3), "reincapo": (1e-1, 1e-5)}  # tau_h, tau_f


def capo_mask(grad_dot: Tensor, hess: Tensor, fisher: Tensor, *, preset: str = "capo", lr: float = 1.5e-5,
              tau_h: float | None = None, tau_f: float | None = None, symmetric: bool = True) -> Tensor:
    r"""Keeps the tokens whose step would change objective and policy by little.

    .. math::
        m_H = \eta\, \langle g, G\rangle + \tfrac12 \eta^2 G'\tilde H G, \qquad m_F = \tfrac12 \eta^2 G'\tilde F G

    A token is kept if :math:`m_F < \tau_F` and :math:`|m_H| < \tau_H`; with ``symmetric=False`` the second is
    :math:`0 \le m_H < \tau_H`. A NaN is not kept.

    Pass the result on as (part of) the mask of the loss, ``policy_loss(..., mask=response_mask & kept)``: rejected
    tokens then leave the numerator and the denominator of each sequence, as in the authors' code.

    Args:
        grad_dot, hess, fisher: from :func:`capo_curvature`, of one shape.
        preset: the recipe that gives the thresholds (tau_h, tau_f): ``"capo"`` (1e-2, 1e-4), ``"dr_capo"``
            (5e-4, 1e-3), ``"reincapo"`` (1e-1, 1e-5).
        lr: the step :math:`\eta`; 1.5e-5 in all three recipes.
        tau_h, tau_f: other thresholds; ``None`` takes the preset's.
        symmetric: see above. True is our default; which recipe uses which could not be confirmed.

    Returns:
        A bool tensor of that shape.

    Raises:
        TypeError: an argument is no dense real floating-point tensor.
        ValueError: shapes or devices differ, or an option is out of its range.

    CAPO, arXiv 2510.00819. A few elementwise torch operations.

    Example:
        >>> import torch
        >>> from gradops.rl import capo_mask
        >>> grad_dot = torch.tensor([10.0, 2000.0, -10.0])
        >>> capo_mask(grad_dot, torch.zeros(3), torch.zeros(3))
        tensor([ True, False,  True])
        >>> capo_mask(grad_dot, torch.zeros(3), torch.zeros(3), symmetric=False)
        tensor([ True, False, False])
    """
    check_floating(grad_dot, "grad_dot")
    for name, x in (("hess", hess), ("fisher", fisher)):
        check_floating(x, name)
        check_like(x, name, grad_dot, "grad_dot")
    check_one_of(preset, "preset", tuple(_PRESETS))
    tau_h = _PRESETS[preset][0] if tau_h is None else tau_h
    tau_f = _PRESETS[preset][1] if tau_f is None else tau_f
    for name, value in (("lr", lr), ("tau_h", tau_h), ("tau_f", tau_f)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    change = torch.add(lr * grad_dot, hess, alpha=0.5 * lr**2)
    return (0.5 * lr**2 * fisher < tau_f) & (change < tau_h) & (change > -tau_h if symmetric else change >= 0)
