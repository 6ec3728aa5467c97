"""What the Gram matrices of per-sample gradients share: blocks of bounded size, checks."""
from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from .._checks import check_device, check_floating
from .._op import register
from .gram import gram

_pairs = register("gram_outer", fake=lambda x, g, bias: x[0].new_empty(
    (x[0].shape[0], x[0].shape[0]), dtype=torch.float64), vmap=False)
_blocks = register("gram_outer_blocks", fake=lambda x, g, bias: x.new_empty(
    (x.shape[0], x.shape[0]), dtype=torch.float64), vmap=False)

# Temporaries of one product are cut to about this many bytes; those of token pairs, which are small products that are
# read again and again, to what a cache holds.
MAX_BYTES, PAIR_BYTES = 2**26, 2**19
# Rows up to which the CUDA kernel takes the products of all pairs of them: it writes them to memory.
MAX_ROWS = 2048
# Samples begin to end, as (tokens of all of them, features) in float64.
Tokens = Callable[[int, int], Tensor]


def pairs_pay(samples: int, tokens: int, d: int, p: int) -> bool:
    """By the operations of the two forms; those of the first take a quarter longer."""
    return tokens <= 1 or 4 * tokens**2 * (p + d) * samples < 5 * p * d * (samples + 2 * tokens)


def add_pairs(out: Tensor, tokens: int, xs: Tokens, gs: Tokens, bias: bool,
              inner: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """The second form, for one square of samples after the other. `inner` stands for the products of the x."""
    samples = out.shape[0]
    step = max(1, isqrt(PAIR_BYTES // 8) // max(1, tokens))
    for i in range(0, samples, step):
        end = min(i + step, samples)
        xi, gi = xs(i, end), gs(i, end)
        for j in range(0, i + 1, step):
            last = min(j + step, samples)
            xj, gj = (xi, gi) if i == j else (xs(j, last), gs(j, last))
            a, b = inner(xi, xj) if inner else _product(xi, xj), _product(gi, gj)
            product = b.addcmul_(b, a) if bias else b.mul_(a)
            # Along long rows first: torch adds them fastest.
            columns = product.view(end - i, tokens, (last - j) * tokens).sum(1)
            square = columns.view(end - i, last - j, tokens).sum(2)
            if i == j:
                square = square.tril() + square.tril(-1).mT  # the sums above the diagonal run in another order
            out[i:end, j:last] += square
            if i != j:
                out[j:last, i:end] += square.mT
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    return gram(a) if a is b else a @ b.mT


def add_layers(out: Tensor, layers: Sequence[tuple[Tensor, Tensor, bool]]) -> Tensor:
    """Of x (B, T, d) or (B, d), g alike and whether there is a bias; by token pairs, in one call of the kernel."""
    xs, gs, biases = list[Tensor](), list[Tensor](), list[bool]()
    for x, g, bias in layers:
        x, g = (t if t.dim() == 3 else t[:, None] for t in (x, g))
        if out.is_cpu or x.shape[0] * x.shape[1] <= MAX_ROWS:
            xs, gs, biases = [*xs, x], [*gs, g], [*biases, bias]
        else:
            add_pairs(out, x.shape[1], partial(_rows, x), partial(_rows, g), bias)
    return out.add_(_pairs(xs, gs, biases)) if xs else out


def _rows(t: Tensor, begin: int, end: int) -> Tensor:
    return t[begin:end].flatten(0, 1).double()


def add_blocks(out: Tensor, x: Tensor, g: Tensor, bias: bool) -> Tensor:
    """The first form: the gradients of a part of the weight for all samples at a time."""
    if out.is_cpu:
        return out.add_(_blocks(x, g, bias))
    if bias:
        out += gram(g.sum(1, dtype=torch.float64))
    return add_blocks_by_torch(out, x, g)


def add_blocks_by_torch(out: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """For CUDA, where the kernel would be torch's products; without the bias."""
    samples, tokens, d = x.shape
    p = g.shape[2]
    room = MAX_BYTES // 8 // max(1, samples)
    rows = max(1, min(p, room // max(1, tokens), isqrt(room)))
    columns = max(1, min(d, room // max(1, rows, tokens)))
    for r in range(0, p, rows):
        part = g[:, :, r:r + rows].mT.double()
        for c in range(0, d, columns):
            out += gram((part @ x[:, :, c:c + columns].double()).flatten(1))
    return out


def check_pair(x: Tensor, g: Tensor) -> None:
    check_floating(x, "x")
    check_floating(g, "g")
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape (B, d) or (B, T, d), got {tuple(x.shape)}")
    if g.dim() != x.dim() or g.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"g must have the leading dimensions of x, {tuple(x.shape[:-1])}, and one more, "
                         f"got shape {tuple(g.shape)}")
    check_device(g, "g", x, "x")


def check_out(out: Tensor | None, samples: int, like: Tensor) -> Tensor:
    """`out` after its checks, or zeros."""
    if out is None:
        return torch.zeros(samples, samples, dtype=torch.float64, device=like.device)
    if not isinstance(out, Tensor) or out.dtype != torch.float64:
        raise TypeError(f"out must be a float64 tensor, got {getattr(out, 'dtype', type(out).__name__)}")
    if out.shape != (samples, samples):
        raise ValueError(f"out must have shape {(samples, samples)}, got {tuple(out.shape)}")
    check_device(out, "out", like, "x")
    return out
