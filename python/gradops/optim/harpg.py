"""Hessian-aided recursive policy gradient."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .recursive import RecursiveOptimizer


class HARPG(RecursiveOptimizer):
    r"""A recursive gradient estimate, carried along by Hessian-vector products (HARPG, and N-HARPG if normalised).

    .. math::
        \hat\theta_t &= b_t \theta_t + (1 - b_t)\, \theta_{t-1}, \qquad b_t \sim U(0, 1) \\
        d_t &= (1 - \eta_t)\, \bigl(d_{t-1} + B(\hat\theta_t)(\theta_t - \theta_{t-1})\bigr) + \eta_t\, g(\theta_t) \\
        \theta_{t+1} &= \theta_t - \gamma_t\, d_t \quad (\text{over } \|d_t\| \text{ of all parameters})

    B is an unbiased estimate of the Hessian from trajectories sampled at :math:`\hat\theta_t`
    (:func:`gradops.curvature.pg_hvp`), so that the correction is an unbiased estimate of
    :math:`\nabla J(\theta_t) - \nabla J(\theta_{t-1})`. A loop::

        with opt.interpolate() as change:   # parameters at theta-hat; change = theta_t - theta_{t-1}
            _, product = pg_hvp((policy, logits), None, change, *sample(policy))
        policy_gradient_loss(policy, sample(policy)).backward()
        opt.step(hvp=product)

    Args:
        params: parameters or groups of them; give ``model.named_parameters()``, and ``change`` is a dict of those
            names; otherwise it is a list. ``lr``, ``eta``, ``decay`` and ``maximize`` may differ between groups.
        lr: :math:`\gamma_0`, a number or a tensor of one element.
        eta: :math:`\eta_0`, in (0, 1].
        normalize: N-HARPG (default), else HARPG.
        decay: the published schedule, with t from 0: :math:`\eta_t = 2 \eta_0 / (t + 2)`, and
            :math:`\gamma_t = 2 \gamma_0 / (t + 2)`, or without `normalize` :math:`\gamma_0 \sqrt{2 / (t + 2)}`.
            Otherwise both stay, and a scheduler may move ``lr``.
        maximize: gradients and products are those of a return, which is to grow, as `pg_hvp` gives them.
        generator: for b, on the CPU.
        state_dtype: of d; by default the parameter's dtype, at least float32.

    The first d is the first gradient. State is d and one number per parameter, from which
    :math:`\theta_t - \theta_{t-1}` is made again; moving the parameters copies them for the time of the block, and
    leaves them bit for bit as they were. Parameters without a gradient stay.

    Source: I. Fatkhullin, A. Barakat, A. Kireeva, N. He, arXiv 2302.01734. Their code keeps both points; for its
    Hessian estimate see :func:`gradops.curvature.pg_hvp`.

    Example:
        >>> import torch
        >>> from gradops.curvature import hvp
        >>> from gradops.optim import HARPG
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = HARPG([x], lr=1.0)
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     (x**2).sum().backward()
        ...     with opt.interpolate() as change:
        ...         _, product = hvp(lambda p: (p[0]**2).sum(), [x], change)
        ...     opt.step(hvp=product)
        >>> x.data
        tensor([2.0000, 2.6667])
    """

    def __init__(self, params: ParamsT, lr: float | Tensor = 0.1, eta: float = 1.0, *, normalize: bool = True,
                 decay: bool = True, maximize: bool = False, generator: torch.Generator | None = None,
                 state_dtype: torch.dtype | None = None) -> None:
        super().__init__(params, {"lr": lr, "eta": eta, "normalize": normalize, "decay": decay, "maximize": maximize,
                                  "state_dtype": state_dtype})
        self.generator = generator

    def _eta(self, group: dict[str, Any]) -> float:
        eta: float = group["eta"]
        return eta * 2 / (group["step"] + 2) if group["decay"] else eta

    @contextmanager
    def interpolate(self) -> Iterator[Any]:
        r"""Parameters at :math:`\hat\theta_t`, with a new b, in the ``with`` block; yields
        :math:`\theta_t - \theta_{t-1}` in the parameters' dtypes, zeros before the first step."""
        device = "cpu" if self.generator is None else self.generator.device
        b = float(torch.rand((), dtype=torch.float64, generator=self.generator, device=device))
        change: list[Tensor] = []
        with torch.no_grad():
            for p in self._params():
                step = self._displacement(p)
                change.append(torch.zeros_like(p) if step is None else step.to(p.dtype))
        with self._shifted(lambda group: b - 1):
            yield dict(zip(self._names(), change, strict=True)) if self._names() else change

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, hvp: Any = None) -> Any:  # type: ignore[override]
        """One step from gradients at the parameters and `hvp`, the product with what :meth:`interpolate` gave, in the
        same structure; the first step may go without. `closure` makes the gradients and returns the loss."""
        products: list[Tensor] | None = None
        if hvp is not None:
            own, params = self._names(), self._params()
            if not isinstance(hvp, dict if own else (list, tuple)):
                raise TypeError(f"hvp must be a {'dict by name' if own else 'list'}, as interpolate() gives it, got "
                                f"{type(hvp).__name__}")
            if len(hvp) != len(params) or (own and set(hvp) != set(own)):
                raise ValueError(f"hvp must have one tensor for each of {len(params)} parameters, got {len(hvp)}")
            given: Any = hvp
            products = [given[n] for n in own] if own else list(given)
            for i, (p, product) in enumerate(zip(params, products, strict=True)):
                if product.shape != p.shape:
                    raise ValueError(f"hvp[{own[i] if own else i!r}] must have shape {tuple(p.shape)}, got "
                                     f"{tuple(product.shape)}")
        elif any(p in self.state for p in self._params()):
            raise ValueError("hvp must be given after the first step: the product of the Hessian with what "
                             "interpolate() yields")
        return self._step(closure, products)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> list[str]:
        return [n for group in self.param_groups for n in group.get("param_names", ())]
