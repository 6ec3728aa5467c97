"""Products with the Jacobian of a linear layer's per-sample gradients, which is never formed."""
import torch
from torch import Tensor

from .._checks import check_device, check_floating
from .._compiler import allow_in_graph
from .._op import refuse_derivative
from .._precision import matmul_precision
from . import _outer
from ._outer import check_pair


def _flat(t: Tensor) -> Tensor:
    return t.flatten(0, -2)


def _weighted(g: Tensor, w: Tensor) -> Tensor:
    """Each sample's output gradients times its weight, as one matrix; rounded once."""
    return _flat(g * w.to(torch.promote_types(g.dtype, torch.float32)).view(-1, *[1] * (g.dim() - 1)))


@allow_in_graph
def outer_vjp(x: Tensor, g: Tensor, w: Tensor, *, bias: bool = True,
              out: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor | None]:
    r"""Weighted sum of the per-sample gradients of a linear layer.

    .. math:: \Delta W = \sum_a w_a \sum_t g_{at} x_{at}^\top, \qquad \Delta b = \sum_a w_a \sum_t g_{at}

    This is the update without a second backward pass (book-keeping).

    Args:
        x: ``(B, d)`` or ``(B, T, d)``; float64, float32, bfloat16 or float16.
        g: ``(B, p)`` or ``(B, T, p)``, on the device of ``x``.
        w: ``(B,)``, floating-point.
        bias: the layer has a bias.
        out: a weight ``(p, d)`` and a bias ``(p,)`` (or None) to which the sums are **added**, in place.

    Returns:
        ``(p, d)`` and ``(p,)`` (None without a bias), in the wider dtype of ``x`` and ``g``, at least float32; ``out``
        where it was given.

    Raises:
        TypeError: an argument is no dense real floating-point tensor.
        ValueError: shapes or devices do not fit.
        RuntimeError: a derivative is asked for.

    One product of 2 B T p d operations, in full precision of its dtype. Source: Bu et al., arXiv 2210.00038.

    Example:
        >>> import torch
        >>> from gradops.linalg import outer_vjp
        >>> x, g = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [2.0]])
        >>> outer_vjp(x, g, torch.tensor([1.0, 0.5]))
        (tensor([[4., 2.]]), tensor([2.]))
    """
    check_pair(x, g)
    _check_weights(w, x)
    refuse_derivative("outer_vjp", x=x, g=g, w=w)
    dtype = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
    if out is None:
        weight = x.new_zeros(g.shape[-1], x.shape[-1], dtype=dtype)
        out = weight, weight.new_zeros(g.shape[-1]) if bias else None
    elif out[0].shape != (g.shape[-1], x.shape[-1]):
        raise ValueError(f"out must be a weight of shape {(g.shape[-1], x.shape[-1])} and a bias, "
                         f"got a weight of shape {tuple(out[0].shape)}")
    weighted = _weighted(g.to(dtype), w)
    weight, shift = out
    with matmul_precision("highest"):
        if weight.dtype == dtype:
            weight.addmm_(weighted.mT, _flat(x.to(dtype)))
        else:
            weight += weighted.mT @ _flat(x.to(dtype))
    if shift is not None:
        shift += weighted.sum(0)
    return out


@allow_in_graph
def outer_jvp(x: Tensor, g: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Inner products of the per-sample gradients of a linear layer with one direction.

    .. math:: y_a = \sum_t g_{at} \cdot (V x_{at} + v)

    Args:
        x: ``(B, d)`` or ``(B, T, d)``; float64, float32, bfloat16 or float16.
        g: ``(B, p)`` or ``(B, T, p)``, on the device of ``x``.
        V: ``(p, d)``, the direction of the weight.
        bias: v, ``(p,)``, the direction of the bias; ``None`` for zero.

    Returns:
        ``(B,)``, float64; the product with V is made in the widest dtype of the arguments, at least float32.

    Raises:
        TypeError: an argument is no dense real floating-point tensor.
        ValueError: shapes or devices do not fit.
        RuntimeError: a derivative is asked for.

    Example:
        >>> import torch
        >>> from gradops.linalg import outer_jvp
        >>> x, g = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [2.0]])
        >>> outer_jvp(x, g, torch.tensor([[1.0, 1.0]]), torch.tensor([1.0]))
        tensor([4., 8.], dtype=torch.float64)
    """
    check_pair(x, g)
    for name, v, shape in (("V", V, (g.shape[-1], x.shape[-1])), ("bias", bias, (g.shape[-1],))):
        if v is None:
            continue
        check_floating(v, name)
        if v.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(v.shape)}")
        check_device(v, name, x, "x")
    refuse_derivative("outer_jvp", x=x, g=g, V=V, bias=bias)
    dtype = torch.promote_types(torch.promote_types(x.dtype, V.dtype), torch.float32)
    with matmul_precision("highest"):
        y = x.to(dtype) @ V.to(dtype).mT
    if bias is not None:
        y += bias
    return (y.double() * g).flatten(1).sum(1)


@allow_in_graph
def per_sample_stats(x: Tensor, g: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor]:
    r"""Squared norm of each per-sample gradient of a linear layer, and its inner product with their mean.

    .. math:: n_a = \|A_a\|^2, \qquad s_a = \langle A_a, \bar{A} \rangle, \qquad \bar{A} = \tfrac1B \sum_b A_b

    Both add up over the layers of a network; the norm and inner-product tests of adaptive batch sizes need no more.
    No matrix of B x B entries is formed.

    Args:
        x: ``(B, d)`` or ``(B, T, d)``; float64, float32, bfloat16 or float16.
        g: ``(B, p)`` or ``(B, T, p)``, on the device of ``x``.
        bias: the layer has a bias, which counts.

    Returns:
        ``norm_sq`` and ``dot``, ``(B,)``, float64.

    Raises:
        TypeError: ``x`` or ``g`` is no dense real floating-point tensor.
        ValueError: shapes or devices do not fit.
        RuntimeError: a derivative is asked for.

    Sources: Byrd, Chin, Nocedal and Wu, Math. Program. 134 (2012) for the norm test; Bollapragada, Byrd and Nocedal,
    arXiv 1710.11258, for the inner-product test.

    Example:
        >>> import torch
        >>> from gradops.linalg import per_sample_stats
        >>> x, g = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [2.0]])
        >>> per_sample_stats(x, g)
        (tensor([ 6., 40.], dtype=torch.float64), tensor([ 7., 24.], dtype=torch.float64))
    """
    check_pair(x, g)
    refuse_derivative("per_sample_stats", x=x, g=g)
    if x.dim() == 2:
        x, g = x[:, None], g[:, None]
    samples, tokens, d = x.shape
    p = g.shape[2]
    pairs = tokens * (p + d) < p * d
    step = max(1, _outer.MAX_BYTES // 8 // max(1, tokens * tokens if pairs else p * d, tokens * (p + d)))
    norms = []
    for a in range(0, samples, step):
        xa, ga = x[a:a + step].double(), g[a:a + step].double()
        if pairs:
            squares = ((xa @ xa.mT + 1 if bias else xa @ xa.mT) * (ga @ ga.mT)).sum((1, 2))
        else:
            squares = (ga.mT @ xa).square().sum((1, 2))
            if bias:
                squares = squares + ga.sum(1).square().sum(1)
        norms.append(squares)
    norm = torch.cat(norms) if norms else x.new_zeros(0, dtype=torch.float64)
    mean, shift = outer_vjp(x, g, x.new_full((samples,), 1 / max(1, samples), dtype=torch.float64), bias=bias)
    return norm, outer_jvp(x, g, mean, shift)


def _check_weights(w: Tensor, x: Tensor) -> None:
    check_floating(w, "w")
    if w.shape != x.shape[:1]:
        raise ValueError(f"w must have shape {tuple(x.shape[:1])}, one weight per sample, got {tuple(w.shape)}")
    check_device(w, "w", x, "x")
