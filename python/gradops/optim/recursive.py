"""What the methods share that correct a recursive gradient estimate along the last displacement."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import check_scalar, check_state_dtype, scalar, zeros_like_state
from .resume import ResumingOptimizer


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

    def _step(self, closure: Callable[[], Any] | None, correction: Callable[[Tensor, Tensor], Tensor | None]) -> Any:
        """`correction` gives for p and d what is added to d before it is mixed with the gradient, if anything."""
        if self._moved:
            raise RuntimeError("step() must be called after the `with` block that moves the parameters")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        directions: list[Tensor] = []
        for group in self.param_groups:
            eta = self._eta(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise TypeError(f"{type(self).__name__} does not support sparse gradients")
                state, sign = self.state[p], -1 if group["maximize"] else 1
                first = not state
                if first:
                    state["momentum_buffer"] = zeros_like_state(p, group)
                d = state["momentum_buffer"]
                grad = p.grad.to(d.dtype) * sign
                if first:
                    d.copy_(grad)
                else:
                    change = correction(p, d)
                    if change is not None:
                        d.add_(change.to(d.dtype), alpha=sign)
                    d.lerp_(grad, eta)
                directions.append(d)
        self._move(_norm(directions) if self.param_groups[0]["normalize"] else None)
        return loss

    def _move(self, norm: Tensor | None) -> None:
        for group in self.param_groups:
            lr = self._lr(group)
            for p in group["params"]:
                if p.grad is None:
                    if p in self.state:
                        self.state[p]["scale"].zero_()  # it stays where it is
                    continue
                d = self.state[p]["momentum_buffer"]
                c = torch.as_tensor(lr, dtype=d.dtype, device=d.device)
                if norm is not None:
                    c = torch.where(norm > 0, c / norm.to(d), 0)
                self.state[p]["scale"] = c.clone()
                p.copy_(p.to(d.dtype) - c * d)
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


def _norm(directions: list[Tensor]) -> Tensor | None:
    """The norm of all of them together, in float64 on the CPU and float32 elsewhere."""
    if not directions:
        return None
    device = directions[0].device
    wide = torch.float64 if device.type == "cpu" else torch.float32
    norms = [torch.linalg.vector_norm(d).to(device, wide) for d in directions]
    return torch.linalg.vector_norm(torch.stack(norms))
