"""Which modules are looked at, what is known of their gradients, and where their samples lie."""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import Parameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from .module_use import ModuleUse, output_dims
from .uses import AffineUse, ConvUse, EmbeddingUse, LinearUse, Use

if TYPE_CHECKING:
    from .capture import Call

# How the samples lie in the outputs of a call, and in its inputs:
#   "first"    the first dimension          "second"    the second: (tokens, samples, features)
#   "items"    the first dimension has several items of a sample in a row, "strided": of all samples in turn
#   "module"   a module without a rule, which knows
Layout = str
_TOKENS = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
CHECKED = (_BatchNorm, nn.Embedding)


def has_rule(module: nn.Module) -> bool:
    """Subclasses count if they compute the same of a weight of their own."""
    for cls in (*_TOKENS, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
                nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
        if isinstance(module, cls):
            own = module._parameters
            return type(module).forward is cls.forward and not is_parametrized(module) and "weight" in own
    return False


def units(model: nn.Module, params: set[Parameter]) -> Iterator[tuple[str, nn.Module, dict[str, Parameter]]]:
    """The outermost modules that own some of `params`, and which; what is below them belongs to them. Batch norms that
    own none come with none, wherever they are."""
    pending, seen = [("", model, False)], set[nn.Module]()
    while pending:
        name, module, inside = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        owner = any(p in params for p in module._parameters.values()) or is_parametrized(module)
        if not inside and owner:
            own = {n: p for n, p in module.named_parameters() if p in params}
            inside = len(own) > 0
            if inside:
                yield name or "the model", module, own
        elif isinstance(module, _BatchNorm):
            yield name, module, {}
        for key, child in module._modules.items():
            if child is not None:
                pending.append((f"{name}.{key}" if name else key, child, inside))


def leaves(*trees: Any) -> list[Any]:
    """Of nested arguments or results; most are tensors, for which torch's own function takes its time."""
    return [leaf for tree in trees for leaf in ([tree] if isinstance(tree, Tensor) else tree_leaves(tree))]


def check_module(module: nn.Module, name: str) -> None:
    """Raises for modules whose gradients are no sum over samples."""
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        raise ValueError(f"{name} ({type(module).__name__}) normalises by the statistics of the batch, so that the "
                         "loss of a sample depends on all others: call its eval(), or use a norm of one sample")
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq"):
            if getattr(module, option):
                raise ValueError(f"{name} (Embedding) has {option}, with which its gradient is not that of its lookup")


def layouts(call: Call, samples: int) -> list[Layout]:
    """What the shape of the output allows, most usual first."""
    if not has_rule(call.module):
        return ["module"]
    shape = call.shapes[0]
    found = ["first"] if shape[0] == samples and len(shape) > 1 else []
    if isinstance(call.module, _TOKENS) and len(shape) > 2 and shape[1] == samples:
        found.append("second")
    if shape[0] % samples == 0 and shape[0] > samples and len(shape) > 1:
        found += ["items", "strided"]
    return found


def rows_first(t: Tensor, layout: Layout, call: Call, samples: int, rows: int) -> Tensor:
    """(rows, items of a row, ...)."""
    if layout == "module":
        dim, = output_dims(call.module, [t], samples)
        layout = "second" if dim else "first"
    if layout == "second":
        t = t.transpose(0, 1)
    elif layout == "strided":
        t = t.unflatten(0, (-1, samples)).transpose(0, 1).flatten(0, 1)
    return t.unflatten(0, (rows, -1))


def build(call: Call, layout: Layout, samples: int, rows: int) -> Use:
    """What a call means for the parameters of its module."""
    if layout == "module":
        return ModuleUse(call, call.params, samples, rows)
    module: Any = call.module
    x, g = _input(call), call.grads[0]
    weight, bias = call.params.get("weight"), call.params.get("bias")

    def tokens(t: Tensor, trailing: int) -> Tensor:
        t = rows_first(t, layout, call, samples, rows)
        return t.flatten(1, t.dim() - 1 - trailing)

    if isinstance(module, nn.Linear):
        x, g = tokens(x, 1), tokens(g, 1)
        if x.shape[1] == 1:
            x, g = x[:, 0], g[:, 0]
        return LinearUse(x, g, weight, bias)
    if isinstance(module, nn.Embedding):
        assert weight is not None
        return EmbeddingUse(tokens(x, 0).long(), tokens(g, 1), weight, module.padding_idx)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        x = _pad(x, module)
        if isinstance(module, nn.Conv1d):
            x, g = x.unsqueeze(-2), g.unsqueeze(-2)
        x, g = (rows_first(t, layout, call, samples, rows) for t in (x, g))
        return ConvUse(x, g, module, weight, bias)
    x = _normalized(x, module)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        n = len(module.normalized_shape)
        x, g = (tokens(t, n).flatten(2) for t in (x, g))
    else:  # channels to the end
        x, g = (tokens(t.movedim(1, -1), 1) for t in (x, g))
    return AffineUse(x, g, weight, bias)


def _input(call: Call) -> Tensor:
    return next(t for t, _ in call.versions).detach()


def _pad(x: Tensor, conv: Any) -> Tensor:
    if conv.padding_mode != "zeros":
        return F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
    return F.pad(x, conv._reversed_padding_repeated_twice) if conv.padding == "same" else x


def _normalized(x: Tensor, norm: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
        if isinstance(norm, nn.RMSNorm):
            return F.rms_norm(x, norm.normalized_shape, None, norm.eps)
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, None, None, norm.eps)
        if isinstance(norm, _BatchNorm):
            return F.batch_norm(x, norm.running_mean, norm.running_var, None, None, False, 0.0, norm.eps)
        own = norm.training or norm.running_mean is None
        mean, var = (None, None) if own else (norm.running_mean, norm.running_var)
        return F.instance_norm(x, mean, var, None, None, own, 0.0, norm.eps)
