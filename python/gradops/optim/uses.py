"""What a module's call in the forward pass means for the per-sample gradients of its parameters.

A `Use` is seen row by row; a row is a sample, or the group of samples that shares a row of the Jacobian M. Its inputs x
and output gradients g are stored rows first. With J the columns of M that belong to `params`, in their order,

    gram_(out)        out += J J^T
    jvp(V)            J V, float64
    prepare(targets)  what must be computed for it before any parameter changes
    vjp_(targets)     target += J^T w, with a target and a w for each parameter

`Use` itself does that by the per-sample gradients, a bounded number at a time; layers have better ways.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.nn.parameter import Parameter

from .. import linalg
from ..linalg._outer import add_layers, pairs_pay

# Per-sample gradients held at a time.
MAX_BYTES = 2**28
Targets = dict[Parameter, tuple[Tensor, Tensor]]


def gram_of(uses: Sequence[Use], rows: Tensor) -> Tensor:
    """J J^T of all of them; the linear layers that go by token pairs in one call."""
    out = torch.zeros(2 * rows.shape, dtype=torch.float64, device=rows.device)
    paired = [use for use in uses if isinstance(use, LinearUse) and use.by_pairs()]
    if paired:
        add_layers(out, [(use.x, use.g, use.bias is not None) for use in paired])
    for use in uses:
        if use not in paired:
            use.gram_(out)
    return out


class Use:
    params: list[Parameter]
    rows: int
    _whole: list[Tensor] | None = None

    def sample_grads(self, begin: int, end: int) -> list[Tensor]:
        """Of rows begin to end, each (end - begin, *shape of the parameter)."""
        raise NotImplementedError

    def merge(self, others: Sequence[Use]) -> Use:
        """This use and others of the same parameters, seen as one."""
        return Shared([self, *others])

    def gram_(self, out: Tensor) -> None:
        blocks = list(self._ranges())
        for i, rows in enumerate(blocks):
            mine = self._block(*rows)
            out[slice(*rows), slice(*rows)] += linalg.gram(mine)
            for others in blocks[:i]:
                product = _products(mine, self._block(*others))
                out[slice(*rows), slice(*others)] += product
                out[slice(*others), slice(*rows)] += product.mT

    def jvp(self, directions: Sequence[Tensor]) -> Tensor:
        flat = [v.reshape(-1) for v in directions]
        parts = []
        for rows in self._ranges():
            block = self._block(*rows)
            parts.append(torch.stack([(b.to(v.dtype) @ v).double() for b, v in zip(block, flat, strict=True)]).sum(0))
        return torch.cat(parts)

    def prepare(self, targets: Targets) -> None:
        pass

    def vjp_(self, targets: Targets) -> None:
        for begin, end in self._ranges():
            for p, block in zip(self.params, self._block(begin, end), strict=True):
                target, w = targets[p]
                target += (w[begin:end].to(block.dtype) @ block).view_as(p)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        size = sum(p.numel() * max(4, p.element_size()) for p in self.params)
        step = max(1, MAX_BYTES // max(1, 2 * size))  # two blocks meet in `gram_`
        for begin in range(0, self.rows, step):
            yield begin, min(begin + step, self.rows)

    def _block(self, begin: int, end: int) -> list[Tensor]:
        if self._whole is None:
            grads = [g.flatten(1) for g in self.sample_grads(begin, end)]
            if end - begin < self.rows:
                return grads
            self._whole = grads
        return self._whole


def _products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """sum of x y^T over the pairs of `a` and `b`, in float64, a bounded number of columns at a time."""
    total = a[0].new_zeros(a[0].shape[0], b[0].shape[0], dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        step = max(1, MAX_BYTES // 32 // (x.shape[0] + y.shape[0]))
        for c in range(0, x.shape[1], step):
            total += x[:, c:c + step].double() @ y[:, c:c + step].double().mT
    return total


class Shared(Use):
    """Uses that share parameters in ways that only their per-sample gradients have in common."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses, self.rows = list(uses), uses[0].rows
        self.params = list(dict.fromkeys(p for use in uses for p in use.params))

    def sample_grads(self, begin: int, end: int) -> list[Tensor]:
        sums: dict[Parameter, Tensor] = {}
        for use in self.uses:
            for p, grad in zip(use.params, use.sample_grads(begin, end), strict=True):
                sums[p] = sums[p] + grad if p in sums else grad
        return [sums[p] for p in self.params]

    def jvp(self, directions: Sequence[Tensor]) -> Tensor:
        of = dict(zip(self.params, directions, strict=True))
        return torch.stack([use.jvp([of[p] for p in use.params]) for use in self.uses]).sum(0)

    def prepare(self, targets: Targets) -> None:
        for use in self.uses:
            use.prepare(targets)

    def vjp_(self, targets: Targets) -> None:
        for use in self.uses:
            use.vjp_(targets)


class LinearUse(Use):
    """x (rows, T, d), g (rows, T, p), or (rows, d), (rows, p)."""

    def __init__(self, x: Tensor, g: Tensor, weight: Parameter | None, bias: Parameter | None) -> None:
        self.x, self.g, self.weight, self.bias, self.rows = x, g, weight, bias, x.shape[0]
        self.params = [p for p in (weight, bias) if p is not None]

    def merge(self, others: Sequence[Use]) -> Use:
        same = all(isinstance(o, LinearUse) and o.weight is self.weight and o.bias is self.bias for o in others)
        if not same:
            return super().merge(others)
        x, g = (torch.cat([t.reshape(self.rows, -1, t.shape[-1]) for t in tensors], 1)
                for tensors in zip((self.x, self.g), *((o.x, o.g) for o in others), strict=True))  # type: ignore[attr-defined]
        return LinearUse(x, g, self.weight, self.bias)

    def by_pairs(self) -> bool:
        if self.weight is None:
            return False
        tokens = self.x.shape[1] if self.x.dim() == 3 else 1
        return pairs_pay(self.rows, tokens, self.x.shape[-1], self.g.shape[-1])

    def gram_(self, out: Tensor) -> None:
        if self.weight is None:
            out += linalg.gram(self._sums())
        else:
            linalg.gram_outer(self.x, self.g, bias=self.bias is not None, out=out)

    def jvp(self, directions: Sequence[Tensor]) -> Tensor:
        if self.weight is None:
            return self._sums() @ directions[0].double()
        return linalg.outer_jvp(self.x, self.g, *directions)

    def vjp_(self, targets: Targets) -> None:
        if self.weight is not None:
            target, w = targets[self.weight]
            linalg.outer_vjp(self.x, self.g, w, out=(target, None))
        if self.bias is not None:
            add_bias(self.g, *targets[self.bias])

    def sample_grads(self, begin: int, end: int) -> list[Tensor]:
        x, g = (t[begin:end].reshape(end - begin, -1, t.shape[-1]) for t in (self.x, self.g))
        return ([g.mT @ x] if self.weight is not None else []) + ([g.sum(1)] if self.bias is not None else [])

    def _sums(self) -> Tensor:
        return self.g.sum(1, dtype=torch.float64) if self.g.dim() == 3 else self.g.double()


def add_bias(g: Tensor, target: Tensor, w: Tensor) -> None:
    """target += the sum of w_a g_a; the last dimension of g is the bias'."""
    sums = g.flatten(1, -2).sum(1, dtype=torch.promote_types(g.dtype, torch.float32)) if g.dim() > 2 else g
    target += w @ sums.double()


class EmbeddingUse(Use):
    """x: indices (rows, T), g (rows, T, d)."""

    def __init__(self, x: Tensor, g: Tensor, weight: Parameter, padding_idx: int | None) -> None:
        self.x, self.weight, self.padding_idx, self.rows = x, weight, padding_idx, x.shape[0]
        self.g = g if padding_idx is None else torch.where((x == padding_idx)[..., None], 0, g)
        self.params = [weight]

    def merge(self, others: Sequence[Use]) -> Use:
        if not all(isinstance(o, EmbeddingUse) for o in others):
            return super().merge(others)
        x, g = (torch.cat(tensors, 1) for tensors in zip((self.x, self.g), *((o.x, o.g) for o in others), strict=True))  # type: ignore[attr-defined]
        return EmbeddingUse(x, g, self.weight, None)

    def gram_(self, out: Tensor) -> None:
        linalg.gram_embedding(self.x, self.g, self.weight.shape[0], out=out)

    def jvp(self, directions: Sequence[Tensor]) -> Tensor:
        return (directions[0][self.x].double() * self.g).sum((1, 2))

    def vjp_(self, targets: Targets) -> None:
        target, w = targets[self.weight]
        target.index_put_((self.x,), (self.g * w[:, None, None]).to(target.dtype), accumulate=True)

    def sample_grads(self, begin: int, end: int) -> list[Tensor]:
        sums = self.g.new_zeros(end - begin, *self.weight.shape)
        place = (torch.arange(end - begin, device=sums.device)[:, None], self.x[begin:end])
        return [sums.index_put_(place, self.g[begin:end], accumulate=True)]


class ConvUse(Use):
    """x (rows, N, C, H, W), g (rows, N, p, h, w); one-dimensional convolutions have H = 1."""

    def __init__(self, x: Tensor, g: Tensor, conv: Any, weight: Parameter | None, bias: Parameter | None) -> None:
        self.x, self.g, self.weight, self.bias, self.rows = x, g, weight, bias, x.shape[0]
        self.params = [p for p in (weight, bias) if p is not None]
        lone = len(conv.kernel_size) == 1
        padding = (0,) * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
        wide = [(fill, *v) if lone else tuple(v) for v, fill in
                ((conv.stride, 1), (padding if conv.padding_mode == "zeros" else (0,) * len(padding), 0),
                 (conv.dilation, 1))]
        self.kernel = (1, *conv.kernel_size) if lone else conv.kernel_size
        self.stride, self.padding, self.dilation = wide
        self.groups = conv.groups

    def _options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def _shape(self, rows: int = 1) -> tuple[int, ...]:
        return (rows * self.g.shape[2], self.x.shape[2] // self.groups, *self.kernel)

    def gram_(self, out: Tensor) -> None:
        if self.weight is None:
            out += linalg.gram(self.g.sum((1, 3, 4), dtype=torch.float64))
        else:
            linalg.gram_conv2d(self.x, self.g, self.kernel, bias=self.bias is not None, out=out, **self._options())

    def jvp(self, directions: Sequence[Tensor]) -> Tensor:
        y = torch.zeros_like(self.g, dtype=torch.float64)
        for p, v in zip(self.params, directions, strict=True):
            if p is self.weight:
                v = v.view(self._shape())
                y += F.conv2d(self.x.flatten(0, 1).to(v.dtype), v, **self._options()).unflatten(0, y.shape[:2])
            else:
                y += v[:, None, None]
        return (y * self.g).flatten(1).sum(1)

    def vjp_(self, targets: Targets) -> None:
        if self.weight is not None:
            target, w = targets[self.weight]
            weighted = (self.g * w.to(self.g.dtype)[:, None, None, None, None]).flatten(0, 1)
            x = self.x.flatten(0, 1).to(weighted.dtype)
            target += conv2d_weight(x, self._shape(), weighted, **self._options()).view_as(target)
        if self.bias is not None:
            add_bias(self.g.movedim(2, -1), *targets[self.bias])

    def sample_grads(self, begin: int, end: int) -> list[Tensor]:
        x, g = self.x[begin:end], self.g[begin:end]
        grads = []
        if self.weight is not None:
            one = [conv2d_weight(a, self._shape(), b, **self._options()) for a, b in zip(x, g, strict=True)]
            grads.append(torch.stack(one).view(-1, *self.weight.shape))
        return grads + ([g.sum((1, 3, 4))] if self.bias is not None else [])


class AffineUse(Use):
    """Scale and shift of a normalisation: x (rows, T, n) normalised, g alike."""

    def __init__(self, x: Tensor, g: Tensor, weight: Parameter | None, bias: Parameter | None) -> None:
        self.x, self.g, self.weight, self.bias, self.rows = x, g, weight, bias, x.shape[0]
        self.params = [p for p in (weight, bias) if p is not None]

    def sample_grads(self, begin: int, end: int) -> list[Tensor]:
        g = self.g[begin:end].double()
        sums = [(self.x[begin:end] * g).sum(1)] if self.weight is not None else []
        sums += [g.sum(1)] if self.bias is not None else []
        return [s.view(-1, *p.shape) for s, p in zip(sums, self.params, strict=True)]
