"""A product with a Hessian by forward over reverse, without a graph of the backward pass.

The parameters carry the vector as their change through the forward and the backward pass. Torch records a graph of the
changes as well, which nobody needs: it is cut behind every call. What makes this route the cheaper one are operations
with fused passes: F.linear, silu and those of this family. Where an operation cannot take part, the changes are dropped
and the graph of the forward pass, which is an ordinary one, goes through double backward.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ._functions import Gradient, check_influence, check_loss, leaves, nodes, recording, split_aux
from ._linear import linear
from ._second_order import has_two_orders
from ._trees import Tree
from .kernels import is_active, multi_head_attention_forward
from .swiglu import swiglu

# Convolutions are faster by double backward; of the others torch has no forward mode, or none of the backward pass.
_REFUSED = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.group_norm, F.mish,
    F.huber_loss, F.grid_sample, F.ctc_loss, F.embedding_bag, torch.cdist, torch.autograd.grad, torch.autograd.backward,
    Tensor.backward, Tensor.detach_, Tensor.requires_grad_, Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    Tensor.data.__set__, Tensor.register_hook,  # type: ignore[attr-defined]
}  # fmt: skip
_REFUSED_NODES = ("SiluBackward", "MishBackward", "NativeGroupNormBackward", "HuberLossBackward", "MseLossBackward",
                  "HardsigmoidBackward", "GridSampler", "ScaledDotProduct", "NotImplemented", "Error", "CppNode",
                  "CopySlices")  # the last may hide any other


# Parameters, below which double backward is faster: seeing every call takes 2 ms for the smallest model.
SMALL = 1 << 16

Found = tuple[Tensor, Any, list[Tensor], list[Tensor]]  # the loss, what else f returns, the gradient, the product


def forward_over_reverse(
    f: Callable[..., Any], params: Tree, v: list[Tensor], has_aux: bool, values: bool
) -> Found | None:
    """None if double backward is to do it from the start; the state of random numbers is then as it was."""
    if forward_ad._current_level >= 0 or _packed():  # type: ignore[attr-defined]
        return None
    if sum(p.numel() for p in params.tensors) < SMALL:
        return None
    devices = sorted({p.get_device() for p in params.tensors if p.is_cuda})
    if devices and torch.cuda.is_current_stream_capturing():  # the state of random numbers cannot be read
        return None
    state = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]
    try:
        return _attempt(f, params, v, has_aux, values)
    except RuntimeError:  # no forward mode: a function of somebody else without jvp, and a few of torch's
        pass
    torch.set_rng_state(state[0])
    for device, s in zip(devices, state[1], strict=True):
        torch.cuda.set_rng_state(s, device)
    return None


def _attempt(f: Callable[..., Any], params: Tree, v: list[Tensor], has_aux: bool, values: bool) -> Found:
    with recording(), forward_ad._set_fwd_grad_enabled(True):
        points = [p.requires_grad_() for p in leaves(params)]
        changes = _Changes()
        try:
            duals = [forward_ad.make_dual(p, t) for p, t in zip(points, v, strict=True)]
            changes.unused = set() if values else {id(d) for d in duals}
            with changes:
                loss, aux = split_aux(f(params.build(duals)), has_aux)
            check_loss(loss)
            if changes.level is not None and all(map(_safe, nodes(loss.grad_fn))):
                del duals
                grads = torch.autograd.grad(loss, points, allow_unused=True)
                check_influence(grads)
                pairs = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in grads]
                del grads
                found = [[torch.zeros_like(p, requires_grad=False) if t is None else t.detach()
                          for t, p in zip(half, points, strict=True)] for half in zip(*pairs, strict=True)]
                return loss.detach(), aux, found[0] if values else [], found[1]
        finally:
            changes.drop()
        # The graph is that of any forward pass.
        g = Gradient(loss, points, values=values)
        return loss.detach(), aux, g.values, g.product(v, keep=False)


def _safe(node: Any) -> bool:
    """Nodes of torch have a forward mode of their backward pass or raise. Functions of others may call, there, what
    neither mode sees into, and give zeros."""
    name = node.name()
    return has_two_orders(node) or not (
        isinstance(node, torch.autograd.function.BackwardCFunction) or any(bad in name for bad in _REFUSED_NODES))


def _packed() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _writes_over_ours(func: Any, args: Any, kwargs: Any) -> bool:
    """Torch does not keep the result of F.linear, so that a model may write over it; the fused passes keep it."""
    name = getattr(func, "__name__", "")
    if not (kwargs.get("inplace") or name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
            or (name.endswith("_") and not name.endswith("__"))):
        return False
    node = args[0].grad_fn if args and isinstance(args[0], Tensor) and args[0]._is_view() else None
    return node is not None and any(child is not None and has_two_orders(child) for child, _ in node.next_functions)


class _Changes(TorchFunctionMode):
    """While f runs: cuts the graph of the changes, and holds them to what reverse mode takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.unused: set[int] = set()  # the weights whose gradient is not asked for
        self.level: int | None = forward_ad.enter_dual_level()

    def drop(self) -> None:
        if self.level is not None:
            forward_ad.exit_dual_level(level=self.level)
            self.level = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.level is None:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])  # what no_grad calculates is a constant
            return func(*args, **kwargs)
        if self._refused(func):
            self.drop()
            return func(*args, **kwargs)
        if _writes_over_ours(func, args, kwargs):
            raise RuntimeError("what is kept for the backward pass would be written over")
        return self._cut(self._fused(func, args, kwargs))

    @staticmethod
    def _refused(func: Any) -> bool:
        if func is F.scaled_dot_product_attention:
            return not is_active()
        # Saved tensors that are packed (checkpoints) or wrapped by torch.func are not for us.
        return (func in _REFUSED or torch._C._functorch.peek_interpreter_stack() is not None
                or _packed())

    def _fused(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return multi_head_attention_forward(*args, **kwargs)
        if func is F.silu and not (kwargs.get("inplace") or args[1:2] == (True,)):
            return swiglu(args[0] if args else kwargs["input"])
        if func is F.mse_loss:  # torch's backward pass has no forward mode
            return _mse_loss(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dim() != 2 or input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
            return F.linear(input, weight, bias)
        return linear(input, weight, bias, False, id(weight) in self.unused, id(bias) in self.unused)

    def _cut(self, out: Any) -> Any:
        if isinstance(out, Tensor):
            if out.is_floating_point() and type(out) is Tensor:
                change = forward_ad.unpack_dual(out).tangent
                if change is not None and not out.requires_grad:
                    return out.detach()
                if change is not None and change.requires_grad and not change._is_view():
                    change.detach_()
        elif isinstance(out, (list, tuple)):
            for t in out:
                self._cut(t)
        return out


def _mse_loss(input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
              weight: Tensor | None = None) -> Tensor:
    given = size_average is None and reduce is None and weight is None and input.shape == target.shape
    if not given or reduction not in ("none", "mean", "sum"):
        return F.mse_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    squares = (input - target).square()
    return squares if reduction == "none" else squares.mean() if reduction == "mean" else squares.sum()
