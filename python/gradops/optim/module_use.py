"""Per-sample gradients of a module without a rule of its own: it is run again, sample by sample."""
from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import Parameter
from torch.utils._pytree import tree_flatten, tree_unflatten

from .uses import Targets, Use

if TYPE_CHECKING:
    from .capture import Call


class ModuleUse(Use):
    """The call of any module whose outputs for a sample depend on that sample's inputs alone, which is checked."""

    def __init__(self, call: Call, params: dict[str, Parameter], samples: int, rows: int) -> None:
        self.call, self.named, self.params, self.rows = call, params, list(params.values()), rows
        self.samples, self.per_row = samples, samples // rows
        self.inputs, self.structure = tree_flatten((call.args, call.kwargs))
        self.inputs = [t.detach() if isinstance(t, Tensor) else t for t in self.inputs]
        dims = input_dims(call.module, call.args, call.kwargs, samples)
        self.in_dims = [d if isinstance(t, Tensor) else None for t, d in zip(self.inputs, dims, strict=True)]
        self.out_dims = output_dims(call.module, call.outputs, samples)
        for t, d in zip(call.outputs, self.out_dims, strict=True):
            if d >= t.dim() or t.shape[d] != samples:
                raise ValueError(f"{call.name}: an output of shape {tuple(t.shape)} has no dimension {d} of "
                                 f"{samples} samples")
        self.vectorized = True

    def sample_grads(self, begin: int, end: int) -> list[Tensor]:
        first, last = begin * self.per_row, end * self.per_row
        inputs = [t if d is None else t.narrow(d, first, last - first)
                  for t, d in zip(self.inputs, self.in_dims, strict=True)]
        grads = [g.narrow(d, first, last - first) for g, d in zip(self.call.grads, self.out_dims, strict=True)]
        if self.vectorized:
            try:
                outs, sums = self._at_once(inputs, grads)
            except (RuntimeError, NotImplementedError, ValueError):  # an operation that torch cannot vectorize
                self.vectorized = False
        if not self.vectorized:
            outs, sums = self._one_by_one(inputs, grads)
        self._check(outs, first, last)
        return [s.unflatten(0, (end - begin, self.per_row)).sum(1) for s in sums]

    def _outputs(self, params: dict[str, Any], leaves: list[Any]) -> list[Tensor]:
        args, kwargs = tree_unflatten(leaves, self.structure)
        found = tree_flatten(functional_call(self.call.module, params, args, kwargs))[0]
        return [found[i] for i in self.call.places]

    def _at_once(self, inputs: list[Any], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        def one(leaves: list[Any], grads: list[Tensor]) -> Any:
            leaves = [t if d is None else t.unsqueeze(d) for t, d in zip(leaves, self.in_dims, strict=True)]
            outs, back, *_ = vjp(lambda params: self._outputs(params, leaves), self.named)
            sums, = back([g.unsqueeze(d).to(o.dtype) for g, o, d in zip(grads, outs, self.out_dims, strict=True)])
            return [o.squeeze(d) for o, d in zip(outs, self.out_dims, strict=True)], [sums[n] for n in self.named]

        out_dims: Any = (self.out_dims, 0)
        vectorized = torch.vmap(one, (self.in_dims, self.out_dims), out_dims, randomness="different")
        # What torch has no vectorized form of, it loops over: fused attention, oneDNN's recurrent layers.
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            return vectorized(inputs, grads)  # type: ignore[no-any-return]

    def _one_by_one(self, inputs: list[Any], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outs, sums = [], []
        for i in range(grads[0].shape[self.out_dims[0]]):
            leaves = [t if d is None else t.narrow(d, i, 1) for t, d in zip(inputs, self.in_dims, strict=True)]
            with torch.enable_grad():
                out = self._outputs(self.named, leaves)
            outs.append([t.detach() for t in out])
            mine = [g.narrow(d, i, 1).to(t.dtype) for g, t, d in zip(grads, out, self.out_dims, strict=True)]
            found = torch.autograd.grad(out, self.params, mine, allow_unused=True)
            sums.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, self.params, strict=True)])
        return ([torch.cat(t, d) for t, d in zip(zip(*outs, strict=True), self.out_dims, strict=True)],
                [torch.stack(s) for s in zip(*sums, strict=True)])

    def _check(self, outs: list[Tensor], first: int, last: int) -> None:
        for again, before, d in zip(outs, self.call.outputs, self.out_dims, strict=True):
            before = before.narrow(d, first, last - first)
            known = torch.where(before.isfinite(), before, 0).float()
            scale = known.abs().max() * torch.finfo(before.dtype).eps ** 0.5
            if bool(((again.float() - known).abs() > scale)[before.isfinite()].any()):
                raise ValueError(
                    f"{self.call.name} ({type(self.call.module).__name__}) gave other outputs for its samples one by "
                    "one than for the batch: it draws random numbers (dropout), or mixes samples"
                )

    def prepare(self, targets: Targets) -> None:
        """No per-sample gradients needed: the graph of the forward pass is still there."""
        groups: dict[int, tuple[Tensor, list[Parameter]]] = {}
        for p in self.params:  # parameters of one learning rate have one w
            groups.setdefault(id(targets[p][1]), (targets[p][1], []))[1].append(p)
        self._products: list[tuple[Parameter, Tensor]] = []
        for w, params in groups.values():
            weights = w.repeat_interleave(self.per_row)
            grads = [g * weights.to(g.dtype).view([-1 if i == d else 1 for i in range(g.dim())])
                     for g, d in zip(self.call.grads, self.out_dims, strict=True)]
            found = torch.autograd.grad(self.call.edges, params, grads, retain_graph=True, allow_unused=True)
            self._products += [(p, grad) for p, grad in zip(params, found, strict=True) if grad is not None]

    def vjp_(self, targets: Targets) -> None:
        for p, product in self._products:
            targets[p][0].add_(product)


def input_dims(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> list[int | None]:
    """The dimension of the samples in every leaf of the inputs; None for what all samples share."""
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        batch = 0 if module.batch_first else 1
        known = {"input": batch, "hx": 1, "query": batch, "key": batch, "value": batch, "key_padding_mask": 0}
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        leaves = [(id(t), known.get(name)) for name, value in bound.items() for t in tree_flatten(value)[0]]
        of = dict(leaves)
        return [of[id(t)] for t in tree_flatten((args, kwargs))[0]]
    return [0 if isinstance(t, Tensor) and t.dim() and t.shape[0] == samples else None
            for t in tree_flatten((args, kwargs))[0]]


def output_dims(module: nn.Module, outputs: list[Tensor], samples: int) -> list[int]:
    if isinstance(module, nn.RNNBase):
        return [0 if module.batch_first and t is outputs[0] else 1 for t in outputs]
    if isinstance(module, nn.MultiheadAttention):
        return [0 if module.batch_first or t is not outputs[0] else 1 for t in outputs]
    return [0] * len(outputs)
