"""Normalised policy gradient with implicit gradient transport."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .recursive import RecursiveOptimizer


class NPGIGT(RecursiveOptimizer):
    r"""Momentum on gradients that are taken ahead of the parameters, so that it does not lag behind (N-PG-IGT).

    .. math::
        \tilde\theta_t = \theta_t + \tfrac{1 - \eta_t}{\eta_t} (\theta_t - \theta_{t-1}), \qquad
        d_t = (1 - \eta_t)\, d_{t-1} + \eta_t\, g(\tilde\theta_t), \qquad
        \theta_{t+1} = \theta_t - \gamma_t\, d_t / \|d_t\|

    with one norm over all parameters. On a quadratic with exact gradients :math:`d_t` is the gradient at
    :math:`\theta_t`. The gradient, and with it the trajectories, are made with the parameters at
    :math:`\tilde\theta_t`, which is what the context is for::

        with opt.extrapolate():
            loss_fn(policy, sample(policy)).backward()
        opt.step()

    ``step(closure)`` does the same by itself: the closure runs at :math:`\tilde\theta_t`.

    Args:
        params: parameters or groups of them. ``lr``, ``eta``, ``decay`` and ``maximize`` may differ between groups.
        lr: :math:`\gamma_0`, a number or a tensor of one element.
        eta: :math:`\eta_0`, in (0, 1].
        normalize: divide by the norm; without, :math:`\theta_{t+1} = \theta_t - \gamma_t d_t`.
        decay: the published schedule, with t from 0: :math:`\eta_t = \eta_0 (2 / (t + 2))^{4/5}`, and
            :math:`\gamma_t = \gamma_0 \cdot 2 / (t + 2)`, or without `normalize` :math:`\gamma_0 \sqrt{2 / (t + 2)}`.
            Otherwise both stay, and a scheduler may move ``lr``.
        maximize: gradients are those of a return, which is to grow.
        state_dtype: of d; by default the parameter's dtype, at least float32.

    The first d is the first gradient. State is d and one number per parameter; moving the parameters copies them for
    the time of the block, and leaves them bit for bit as they were. Parameters without a gradient stay.

    Source: I. Fatkhullin, A. Barakat, A. Kireeva, N. He, arXiv 2302.01734, after A. Cutkosky and H. Mehta,
    arXiv 2002.03305.

    Example:
        >>> import torch
        >>> from gradops.optim import NPGIGT
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = NPGIGT([x], lr=1.0)
        >>> with opt.extrapolate():
        ...     (x**2).sum().backward()
        >>> opt.step()
        >>> x.data
        tensor([2.4000, 3.2000])
    """

    def __init__(self, params: ParamsT, lr: float | Tensor = 0.1, eta: float = 1.0, *, normalize: bool = True,
                 decay: bool = True, maximize: bool = False, state_dtype: torch.dtype | None = None) -> None:
        super().__init__(params, {"lr": lr, "eta": eta, "normalize": normalize, "decay": decay, "maximize": maximize,
                                  "state_dtype": state_dtype})

    def _eta(self, group: dict[str, Any]) -> float:
        eta: float = group["eta"]
        return eta * (2 / (group["step"] + 2)) ** 0.8 if group["decay"] else eta

    @contextmanager
    def extrapolate(self) -> Iterator[None]:
        r"""Parameters at :math:`\tilde\theta_t` in the ``with`` block; before the first step, where they are."""
        with self._shifted(lambda group: (1 - self._eta(group)) / self._eta(group)):
            yield

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from gradients that were made under :meth:`extrapolate`; `closure` is run under it."""
        ahead = None
        if closure is not None:
            def ahead() -> Any:
                with self.extrapolate():
                    return closure()
        return self._step(ahead, None)
