"""What the methods share that correct a recursive gradient estimate along the last displacement."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._op import register
from .base import check_scalar, check_state_dtype, scalar, zeros_like_state
from .resume import ResumingOptimizer

_update = register("harpg_update_", fake=lambda d, *_: d[0].new_empty((), dtype=torch.float64), vmap=False)
_apply = register("harpg_apply_", fake=lambda *_: None, vmap=False)


class RecursiveOptimizer(ResumingOptimizer):
    r"""Base: :math:`\theta_{t+1} = \theta_t - \gamma_t d_t`, over :math:`\|d_t\|` of all parameters if `normalize`.

    A subclass says how d follows from the gradients. State of a parameter: d (``momentum_buffer``) and the number c
    (``scale``) by which it was multiplied in the last step, so that :math:`\theta_t - \theta_{t-1} = -c d_{t-1}` needs
    no copy of the parameters. Each group counts its steps in ``step``.
    """

    _moved = False

    def __init__(self, params: ParamsT, settings: dict[str, Any]) -> None:
        super().__init__(params, {**settings, "step": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_scalar("lr", group["lr"])
            check_state_dtype(group["state_dtype"])
            if not 0 < group["eta"] <= 1:
                raise ValueError(f"eta must be in (0, 1], got {group['eta']!r}")
            for name in ("normalize", "decay", "maximize"):
                if not isinstance(group[name], bool):
                    raise TypeError(f"{name} must be a bool, got {group[name]!r}")
            if group["normalize"] != self.param_groups[0]["normalize"]:
                raise ValueError("normalize must be the same in every group: the norm is that of all parameters")
            for p in group["params"]:
                if not p.is_floating_point():
                    raise TypeError(f"params must be real and floating-point, got one of dtype {p.dtype}")
        except Exception:
            self.param_groups.pop()
            raise

    # What subclasses define: eta of a group now, and the new d.

    def _eta(self, group: dict[str, Any]) -> float:
        raise NotImplementedError

    def _lr(self, group: dict[str, Any]) -> Any:
        lr = scalar(group["lr"])
        if not group["decay"]:
            return lr
        factor: float = 2 / (group["step"] + 2)
        return lr * (factor if group["normalize"] else factor**0.5)

    def _step(self, closure: Callable[[], Any] | None, corrections: dict[Tensor, Tensor] | None) -> Any:
        """`corrections`: what is added to the d of each parameter before it is mixed with the gradient."""
        if self._moved:
            raise RuntimeError("step() must be called after the `with` block that moves the parameters")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving: dict[torch.device, _Update] = {}
        for group in self.param_groups:
            eta = self._eta(group)
            for p in group["params"]:
                if p.grad is None:
                    if p in self.state:
                        self.state[p]["scale"].zero_()  # it stays where it is
                    continue
                if p.grad.layout != torch.strided:
                    raise TypeError(f"{type(self).__name__} does not support sparse gradients")
                state = self.state[p]
                first = not state
                if first:
                    d = state["momentum_buffer"] = zeros_like_state(p, group)
                    state["scale"] = d.new_zeros(())
                change = None if corrections is None else corrections.get(p)
                moving.setdefault(p.device, _Update()).add(
                    state["momentum_buffer"], change, p.grad, 1.0 if first else eta, -1.0 if group["maximize"] else 1.0)
        norms = [update.run() for update in moving.values()]
        self._move(_norm(norms) if norms and self.param_groups[0]["normalize"] else None)
        return loss

    def _move(self, norm: Tensor | None) -> None:
        for group in self.param_groups:
            lr = self._lr(group)
            devices: dict[torch.device, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    devices.setdefault(p.device, []).append(p)
            for device, params in devices.items():
                directions = [self.state[p]["momentum_buffer"] for p in params]
                laid = [_laid_like(p.detach(), d) for p, d in zip(params, directions, strict=True)]
                tensor = lr.to(device) if isinstance(lr, Tensor) else None
                _apply(laid, directions, [self.state[p]["scale"] for p in params], 1.0 if tensor is not None else lr,
                       tensor, None if norm is None else norm.to(device))
                for p, new, d in zip(params, laid, directions, strict=True):
                    if p.stride() != d.stride():
                        p.copy_(new)
                torch.autograd.graph.increment_version(params)
            group["step"] += 1

    # Where gradients or products are asked for.

    def _displacement(self, p: Tensor) -> Tensor | None:
        """The last step of p, in the dtype of its state; None if there was none."""
        state = self.state.get(p)
        return -state["scale"] * state["momentum_buffer"] if state else None

    @contextmanager
    def _shifted(self, factor: Callable[[dict[str, Any]], float]) -> Iterator[None]:
        """Parameters at theta_t + factor (theta_t - theta_{t-1}), and afterwards exactly where they were."""
        if self._moved:
            raise RuntimeError("the parameters are already moved: these `with` blocks do not nest")
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            self._moved = True
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        change = self._displacement(p)
                        if change is not None:
                            kept.append((p, p.detach().clone()))
                            p.copy_(p.to(change.dtype) + factor(group) * change)
            yield
        finally:
            with torch.no_grad():
                for p, old in kept:
                    p.copy_(old)
            self._moved = False


class _Update:
    """The tensors of one device, for one call."""

    def __init__(self) -> None:
        self.d: list[Tensor] = []
        self.change: list[Tensor] = []
        self.grad: list[Tensor] = []
        self.eta: list[float] = []
        self.sign: list[float] = []

    def add(self, d: Tensor, change: Tensor | None, grad: Tensor, eta: float, sign: float) -> None:
        self.d.append(d)
        if change is not None:
            self.change.append(_laid_like(change, d))
        self.grad.append(_laid_like(grad, d))
        self.eta.append(eta)
        self.sign.append(sign)

    def run(self) -> Tensor:
        """The norm of all new d together."""
        norm: Tensor = _update(self.d, self.change, self.grad, self.eta, self.sign)
        return norm


def _laid_like(x: Tensor, d: Tensor) -> Tensor:
    """x, or a copy of it whose numbers lie in memory as those of d do."""
    return x if x.stride() == d.stride() else torch.empty_like(d, dtype=x.dtype).copy_(x)


def _norm(norms: list[Tensor]) -> Tensor:
    """Of all devices together."""
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
