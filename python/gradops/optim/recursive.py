"""What the methods share that correct a recursive gradient estimate along the last displacement."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._op import register
from .base import _local, _placements, check_scalar, check_state_dtype, scalar, zeros_like_state
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

    def _step(self, closure: Callable[[], Any] | None, corrections: Sequence[Tensor] | None) -> Any:
        """`corrections`: what is added to the d of each parameter before it is mixed with the gradient."""
        if self._moved:
            raise RuntimeError("step() must be called after the `with` block that moves the parameters")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        change = None if corrections is None else iter(corrections)
        devices: dict[torch.device, tuple[list[_Sweep], list[float]]] = {}
        groups = [(group, self._sweeps(group, change)) for group in self.param_groups]
        for group, sweeps in groups:
            for device, sweep in sweeps.items():
                own, signs = devices.setdefault(device, ([], []))
                own.append(sweep)
                signs += [-1.0 if group["maximize"] else 1.0] * len(sweep.d)
        norms = [_update_all(*pair) for pair in devices.values()]
        norm = _norm(norms) if norms and self.param_groups[0]["normalize"] else None
        for group, sweeps in groups:
            lr = self._lr(group)
            for device, sweep in sweeps.items():
                sweep.apply(lr, None if norm is None else norm.to(device))
            group["step"] += 1
        return loss

    def _sweeps(self, group: dict[str, Any], changes: Iterator[Tensor] | None) -> dict[torch.device, _Sweep]:
        eta = self._eta(group)
        sweeps: dict[torch.device, _Sweep] = {}
        for p in group["params"]:
            change = None if changes is None else next(changes)
            grad = p.grad
            if grad is None:
                if p in self.state:
                    self.state[p]["scale"].zero_()  # it stays where it is
                continue
            if grad.layout != torch.strided:
                raise TypeError(f"{type(self).__name__} does not support sparse gradients")
            state = self.state[p]
            first = not state
            if first:
                state["momentum_buffer"] = zeros_like_state(p, group)
                state["scale"] = torch.zeros((), dtype=state["momentum_buffer"].dtype, device=p.device)
            sweep = sweeps.get(p.device)
            if sweep is None:
                sweep = sweeps[p.device] = _Sweep()
            d = state["momentum_buffer"]
            if _placements(p) is not None:
                sweep.whole.append(d)
                p, d, grad = _local(p), _local(d), _local(grad)
                change = None if change is None else _local(change)
            sweep.params.append(p)
            sweep.d.append(d)
            sweep.scale.append(state["scale"])
            sweep.grad.append(grad)
            sweep.eta.append(1.0 if first else eta)
            if change is not None:
                sweep.change.append(change)
        return sweeps

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


class _Sweep:
    """The tensors of one group on one device."""

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.d: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.change: list[Tensor] = []
        self.grad: list[Tensor] = []
        self.eta: list[float] = []
        self.whole: list[Tensor] = []  # those of d that are DTensors; the others are in d alone

    def apply(self, lr: Any, norm: Tensor | None) -> None:
        number, tensor = (1.0, lr.to(self.d[0].device)) if isinstance(lr, Tensor) else (lr, None)
        _apply(self.params, self.d, self.scale, number, tensor, norm)
        torch.autograd.graph.increment_version(self.params)


def _update_all(sweeps: list[_Sweep], signs: list[float]) -> Tensor:
    """The new d of them all, and their norm."""
    def joined(name: str) -> list[Any]:
        return [x for s in sweeps for x in getattr(s, name)]

    norm: Tensor = _update(joined("d"), joined("change"), joined("grad"), joined("eta"), signs)
    whole = joined("whole")
    if whole:  # what this process has of them is not all
        local = {id(_local(d)) for d in whole}
        norms = [torch.linalg.vector_norm(d).full_tensor() for d in whole]
        norms += [torch.linalg.vector_norm(d) for d in joined("d") if id(d) not in local]
        norm = torch.linalg.vector_norm(torch.stack([n.double() for n in norms]))
    return norm


def _norm(norms: list[Tensor]) -> Tensor:
    """Of all devices together."""
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
