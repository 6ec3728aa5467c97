"""The step that all optimizers of this family share: momentum, one kernel call per shape, decay, loss scaling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from .._checks import check_number
from .layouts import check_layout, check_shape, from_matrices, to_matrices
from .resume import ResumingOptimizer

# A batch is copied together before its kernel call; this bounds the copy (512 MiB in float32). Matrices large enough
# to reach it fill the machine one by one.
MAX_BATCH_ELEMENTS = 2**27


class _Item(NamedTuple):
    """One parameter at work in this step; tensors are local (never DTensor)."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]


class MatrixOptimizer(ResumingOptimizer):
    r"""Base: :math:`p \leftarrow (1 - \eta\lambda)\, p - \eta\, \Delta(M)`, with :math:`\Delta` given by a subclass.

    A subclass defines `_kernel`, and `_check` for settings of its own. Its `__init__` names every setting of a
    parameter group; parameters with equal settings (other than `lr` and `weight_decay`), shape, dtype and device go
    through one kernel call, whichever group they are in.

    All of them take tensor `lr` and `weight_decay` without a host sync, closures, learning-rate schedulers,
    `torch.amp.GradScaler` (a step with infinite or NaN gradients changes nothing and needs no host sync),
    `state_dict` round trips that keep the state's dtype, CUDA graph capture, and replicated DTensors.
    """

    _step_supports_amp_scaling = True
    _defaults: ClassVar[dict[str, Any]] = {}  # every setting of a group and its default, from the signature of __init__
    _kernel_settings: ClassVar[tuple[str, ...]] = ()  # those that must be equal within one kernel call
    _elementwise = False  # the update knows no matrices, and is right on any shard

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]
        cls._defaults = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        cls._kernel_settings = tuple(name for name in cls._defaults if name not in ("lr", "weight_decay"))

    def __init__(self, params: ParamsT, settings: dict[str, Any]) -> None:
        super().__init__(params, {name: value for name, value in settings.items() if name in self._defaults})

    # What subclasses define.

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError for settings that make no sense."""

    @classmethod
    def _kernel(cls, batch: Tensor, group: dict[str, Any], param_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Direction U of each matrix in `batch` (..., m, n), and a scale (..., 1, 1) of the step, or None for 1."""
        raise NotImplementedError

    @classmethod
    def _init_state(cls, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum_buffer": zeros_like_state(param, group)} if group["momentum"] != 0 else {}

    @classmethod
    def _directions(cls, items: list[_Item], grads: list[Tensor]) -> list[Tensor]:
        """What the step subtracts, times lr; updates the momentum."""
        group = items[0].group
        beta, layout, heads = group["momentum"], group["layout"], group["heads"]
        polar_first = group.get("polar_first", False)
        momenta = [item.state["momentum_buffer"] for item in items] if beta != 0 else grads
        sources = grads
        if beta != 0 and not polar_first:
            torch._foreach_lerp_(momenta, grads, 1 - beta)
            sources = list(torch._foreach_lerp(grads, momenta, beta)) if group.get("nesterov") else momenta
        direction, scale = cls._kernel(_stack(sources, layout, heads), group, items[0].param.dtype)
        if beta != 0 and polar_first:
            unit = [from_matrices(u, layout, item.param.shape) for u, item in zip(direction, items, strict=True)]
            torch._foreach_lerp_(momenta, unit, 1 - beta)
            direction = _stack(momenta, layout, heads)
        if scale is not None:
            direction = direction * scale
        return [from_matrices(u, layout, item.param.shape) for u, item in zip(direction, items, strict=True)]

    def _rule(self, group: dict[str, Any]) -> type[MatrixOptimizer]:
        """The class whose update a group takes."""
        return type(self)

    # Construction and checkpoints.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            rule = self._rule(group)
            for name, value in rule._defaults.items():
                group.setdefault(name, value)
            _check_common(group)
            rule._check(group)
            for i, p in enumerate(group["params"]):
                _check_param(p, _name(group, i), rule, group)
        except Exception:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Groups of a checkpoint that knew fewer settings (torch.optim.Muon's, say) get the defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._rule(group)._defaults.items():
                group.setdefault(name, self.defaults.get(name, value))

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; `closure` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for rule, items in self._batches():
            grads = _working_grads(items, grad_scale, found_inf)
            if found_inf is None:
                _apply(items, rule._directions(items, grads))
            else:
                _step_unless(found_inf, rule, items, grads)
        return loss

    def _batches(self) -> Iterator[tuple[type[MatrixOptimizer], list[_Item]]]:
        """Parameters with a gradient, gathered into those that share a kernel call."""
        batches: dict[tuple[Any, ...], list[_Item]] = {}
        for group in self.param_groups:
            rule = self._rule(group)
            settings = tuple([_hashable(group[name]) for name in rule._kernel_settings])
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None or p.numel() == 0:
                    continue
                if grad.layout != torch.strided:
                    raise TypeError(
                        f"{type(self).__name__} does not support sparse gradients: that of {_name(group, i)} "
                        f"has layout {grad.layout}; use nn.Embedding(sparse=False)"
                    )
                state = self.state[p]
                if not state:
                    state.update(rule._init_state(_local(p), group))
                item = _Item(_local(p), _local(grad), state, group)
                shape = None if rule._elementwise else p.shape
                key = (rule, settings, shape, p.dtype, p.device)
                batches.setdefault(key, []).append(item)
        for key, items in batches.items():
            size = max(1, MAX_BATCH_ELEMENTS // max(item.param.numel() for item in items))
            for start in range(0, len(items), size):
                yield key[0], items[start : start + size]


def zeros_like_state(param: Tensor, group: dict[str, Any]) -> Tensor:
    """State in `state_dtype`, by default the parameter's own dtype but at least float32."""
    dtype = group["state_dtype"]
    if dtype is None:
        dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _stack(tensors: list[Tensor], layout: str, heads: int | None) -> Tensor:
    matrices = [to_matrices(t, layout, heads) for t in tensors]
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0].unsqueeze(0)


def _working_grads(items: list[_Item], grad_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor]:
    """Gradients in the state's dtype, unscaled, with the sign of a minimisation; p.grad itself stays as it is."""
    dtype = items[0].group["state_dtype"] or torch.promote_types(items[0].param.dtype, torch.float32)
    grads = []
    for item in items:
        grad = item.grad if item.grad.dtype == dtype else item.grad.to(dtype)
        if grad_scale is not None:
            grad = grad / grad_scale.to(grad.device, non_blocking=True)
        if found_inf is not None:  # this step will be undone: nothing in it need meet an infinity
            grad = torch.where(found_inf.to(grad.device, non_blocking=True) != 0, 0.0, grad)
        grads.append(grad)
    return list(torch._foreach_neg(grads)) if items[0].group["maximize"] else grads


def _apply(items: list[_Item], directions: list[Tensor]) -> None:
    """p <- (1 - lr wd) p - lr D. Below float32 both terms are summed in D's dtype and rounded once."""
    for _, run in groupby(zip(items, directions, strict=True), key=lambda pair: id(pair[0].group)):
        run_items, run_directions = map(list, zip(*run, strict=True))
        group = run_items[0].group
        lr, decay = scalar(group["lr"]), scalar(group["weight_decay"])
        params = [item.param for item in run_items]
        dtype = run_directions[0].dtype
        wide = params if params[0].dtype == dtype else [p.to(dtype) for p in params]
        if isinstance(lr, Tensor) or isinstance(decay, Tensor):
            torch._foreach_mul_(wide, 1 - lr * decay)
        elif decay != 0:
            torch._foreach_mul_(wide, factor(1 - lr * decay, wide))
        if isinstance(lr, Tensor):
            torch._foreach_sub_(wide, torch._foreach_mul(run_directions, lr))
        else:
            torch._foreach_add_(wide, run_directions, alpha=-lr)
        if wide is not params:
            torch._foreach_copy_(params, wide)


def _step_unless(found_inf: Tensor, rule: type[MatrixOptimizer], items: list[_Item], grads: list[Tensor]) -> None:
    """The step, undone on the device if `found_inf` is not zero."""
    tensors = [t for item in items for t in (item.param, *item.state.values())]
    kept = [t.clone() for t in tensors]
    _apply(items, rule._directions(items, grads))
    for t, old in zip(tensors, kept, strict=True):
        t.copy_(torch.where(found_inf.to(t.device, non_blocking=True) != 0, old, t))


def scalar(x: Any) -> Any:
    return x.reshape(()) if isinstance(x, Tensor) else x


def factor(x: float, tensors: list[Tensor]) -> float | Tensor:
    """A number to multiply many tensors by: on the CPU torch makes a tensor of it, and for each of them anew."""
    if len(tensors) < 8 or not tensors[0].is_cpu:
        return x
    return torch.tensor(x, dtype=torch.promote_types(tensors[0].dtype, torch.float32), device="cpu")


def _hashable(x: Any) -> Any:
    return tuple(_hashable(v) for v in x) if isinstance(x, (list, tuple)) else x


def _placements(x: Tensor) -> tuple[Any, ...] | None:
    """Those of a DTensor, None for a plain tensor."""
    return None if type(x) in (Tensor, Parameter) else getattr(x, "placements", None)


def _local(x: Tensor) -> Tensor:
    return x if _placements(x) is None else x.to_local()  # type: ignore[attr-defined]


def check_positive_eps(group: dict[str, Any]) -> None:
    if not group["eps"] > 0:
        raise ValueError(f"eps must be > 0 for a regularised polar factor, got {group['eps']!r}")


def _name(group: dict[str, Any], i: int) -> str:
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i} of its group"


def check_scalar(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got a tensor of shape {tuple(value.shape)}")
        return
    check_number(value, name)
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value!r}")


def check_state_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"state_dtype must be a floating-point torch.dtype or None, got {dtype!r}")


def _check_common(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        check_scalar(name, group[name])
    if "momentum" in group and not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be in [0, 1), got {group['momentum']!r}")
    if "eps" in group and not group["eps"] >= 0:
        raise ValueError(f"eps must be >= 0, got {group['eps']!r}")
    check_state_dtype(group["state_dtype"])
    if group.get("precision") not in (None, "highest", "high", "medium"):
        raise ValueError(f"precision must be None, 'highest', 'high' or 'medium', got {group['precision']!r}")
    if "layout" in group:
        check_layout(group["layout"], group["heads"])


def _check_param(p: Tensor, name: str, rule: type[MatrixOptimizer], group: dict[str, Any]) -> None:
    if not p.is_floating_point():
        raise TypeError(f"params: {name} has dtype {p.dtype}, but a real floating-point dtype is expected")
    if not rule._elementwise:
        check_shape(p.shape, group["layout"], group["heads"], name)
        placements = _placements(p)
        if placements is not None and not all(placement.is_replicate() for placement in placements):
            raise NotImplementedError(
                f"params: {name} is a DTensor with placements {placements}; {rule.__name__} needs whole matrices, "
                "and the update of a shard is not a shard of the update: keep matrix parameters replicated"
            )
