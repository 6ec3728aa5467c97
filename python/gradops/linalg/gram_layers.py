"""Gram matrices of the per-sample gradients of convolutions, embeddings and normalisations."""
import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_device, check_floating, check_integers, check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative
from . import _outer
from ._outer import add_pairs, check_out, check_pair, pairs_pay
from .gram import gram

Pair = int | tuple[int, int]


def _pair(v: Pair) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else (v[0], v[1])


@allow_in_graph
def gram_conv2d(x: Tensor, g: Tensor, kernel_size: Pair, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1,
                groups: int = 1, bias: bool = True, mode: str = "auto", out: Tensor | None = None) -> Tensor:
    r"""Inner products of the per-sample gradients of a two-dimensional convolution.

    A convolution is a linear layer whose tokens are the positions of its output, and whose inputs are the patches
    under its kernel: this is :func:`gram_outer` of these. Patches are made for a part of the samples, or of the
    channels, at a time.

    Args:
        x: inputs ``(B, C, H, W)``, or ``(B, N, C, H, W)`` for N images per sample; float64, float32, bfloat16 or
            float16.
        g: output gradients ``(B, p, h, w)`` or ``(B, N, p, h, w)``.
        kernel_size, stride, padding, dilation, groups: as of ``torch.nn.Conv2d``, with zeros for padding.
        bias, mode, out: as of :func:`gram_outer`; groups go by sample blocks whatever ``mode`` is.

    Returns:
        ``(B, B)``, float64, symmetric to the bit; ``out`` where it was given.

    Raises:
        TypeError: ``x`` or ``g`` is no dense real floating-point tensor, or ``out`` is not float64.
        ValueError: shapes or devices do not fit, or an option is out of its range.
        RuntimeError: a derivative is asked for.

    Example:
        >>> import torch
        >>> from gradops.linalg import gram_conv2d
        >>> gram_conv2d(torch.ones(2, 1, 3, 3), torch.ones(2, 1, 2, 2), 2)
        tensor([[80., 80.],
                [80., 80.]], dtype=torch.float64)
    """
    check_floating(x, "x")
    check_floating(g, "g")
    check_one_of(mode, "mode", ("auto", "pairs", "blocks"))
    if x.dim() not in (4, 5):
        raise ValueError(f"x must have shape (B, C, H, W) or (B, N, C, H, W), got {tuple(x.shape)}")
    if x.dim() == 4 and g.dim() == 4:
        x, g = x[:, None], g[:, None]
    kernel, strides, pads, dilations = map(_pair, (kernel_size, stride, padding, dilation))
    sizes = [(n + 2 * q - e * (k - 1) - 1) // s + 1
             for n, q, e, k, s in zip(x.shape[3:], pads, dilations, kernel, strides, strict=True)]
    if g.dim() != 5 or g.shape[:2] != x.shape[:2] or list(g.shape[3:]) != sizes:
        raise ValueError(f"g must have shape {(*x.shape[:2], 'p', *sizes)}, which x {tuple(x.shape)} and the options "
                         f"give, got {tuple(g.shape)}")
    samples, images, channels, p = *x.shape[:3], g.shape[2]
    if groups < 1 or channels % groups or p % groups:
        raise ValueError(f"groups must divide the channels, {channels} in and {p} out, got {groups}")
    check_device(g, "g", x, "x")
    out = check_out(out, samples, x)
    refuse_derivative("gram_conv2d", x=x, g=g, out=out)
    area, places = kernel[0] * kernel[1], sizes[0] * sizes[1]
    if x.numel() == 0 or g.numel() == 0:
        return out

    def patches(part: Tensor) -> Tensor:
        """(n, c, H, W) to (n, c area, places) in float64."""
        return F.unfold(part.double(), kernel, dilations, pads, strides)

    tokens = images * places
    if groups == 1 and (mode == "pairs" or (mode == "auto" and pairs_pay(samples, tokens, channels * area, p))):
        return add_pairs(out, tokens, lambda i, j: patches(x[i:j].flatten(0, 1)).mT.flatten(0, 1),
                         lambda i, j: g[i:j].flatten(3).mT.double().reshape(-1, p), bias)
    inner, outer = channels // groups, p // groups
    xg, gg = x.unflatten(2, (groups, inner)), g.flatten(3).unflatten(2, (groups, outer))
    room = _outer.MAX_BYTES // 8 // max(1, samples)
    width = area * max(outer, tokens)  # numbers of one sample and channel: its gradients, or its patches
    wide = max(1, min(inner, room // width))  # channels at a time
    many = max(1, min(groups, room // (width * inner))) if wide == inner else 1  # groups at a time
    for q in range(0, groups, many):
        gq = gg[:, :, q:q + many].double().transpose(1, 2)  # samples, groups, images, p, places
        for c in range(0, inner, wide):
            part = xg[:, :, q:q + many, c:c + wide].transpose(1, 2)
            u = patches(part.flatten(0, 2)).unflatten(0, part.shape[:3])
            out += gram((gq @ u.mT).sum(2).flatten(1))
    return out.add_(gram(g.sum((1, 3, 4), dtype=torch.float64))) if bias else out


@allow_in_graph
def gram_embedding(indices: Tensor, g: Tensor, num_embeddings: int, *, padding_idx: int | None = None,
                   mode: str = "auto", out: Tensor | None = None) -> Tensor:
    r"""Inner products of the per-sample gradients of an embedding.

    .. math:: G_{ab} = \sum_{ts} [i_{at} = i_{bs}]\; g_{at} \cdot g_{bs}

    Args:
        indices: ``(B,)`` or ``(B, T)``, int32 or int64, from 0 to ``num_embeddings`` - 1.
        g: ``(B, d)`` or ``(B, T, d)``; float64, float32, bfloat16 or float16.
        num_embeddings: rows of the table.
        padding_idx: the row without a gradient, if any.
        mode: ``"pairs"`` compares all pairs of tokens, ``"blocks"`` gathers the gradients of each sample by row;
            ``"auto"``: pairs where :math:`T^2` is less than ``num_embeddings`` (or B T, if that is less).
        out: ``(B, B)``, float64; the Gram is **added** to it.

    Returns:
        ``(B, B)``, float64, symmetric to the bit; ``out`` where it was given.

    Raises:
        TypeError: ``indices`` are no integers, ``g`` is not floating-point, or ``out`` is not float64.
        ValueError: shapes or devices do not fit, or ``mode`` is unknown.
        RuntimeError: a derivative is asked for.

    Example:
        >>> import torch
        >>> from gradops.linalg import gram_embedding
        >>> gram_embedding(torch.tensor([[0, 1], [1, 1]]), torch.ones(2, 2, 1), 3)
        tensor([[2., 2.],
                [2., 4.]], dtype=torch.float64)
    """
    check_integers(indices, "indices")
    check_floating(g, "g")
    check_one_of(mode, "mode", ("auto", "pairs", "blocks"))
    if indices.dim() not in (1, 2):
        raise ValueError(f"indices must have shape (B,) or (B, T), got {tuple(indices.shape)}")
    if g.dim() != indices.dim() + 1 or g.shape[:-1] != indices.shape:
        raise ValueError(f"g must have the shape of indices, {tuple(indices.shape)}, and one dimension more, "
                         f"got {tuple(g.shape)}")
    check_device(g, "g", indices, "indices")
    samples = indices.shape[0]
    out = check_out(out, samples, g)
    refuse_derivative("gram_embedding", g=g, out=out)
    if g.numel() == 0:
        return out
    indices, g = indices.reshape(samples, -1).long(), g.reshape(samples, -1, g.shape[-1])
    if padding_idx is not None:
        g = torch.where((indices == padding_idx)[..., None], 0, g)
    tokens, d = g.shape[1:]
    rows = min(num_embeddings, samples * tokens)
    if mode == "pairs" or (mode == "auto" and tokens**2 < rows):
        return add_pairs(out, tokens, lambda i, j: indices[i:j].flatten(), lambda i, j: g[i:j].flatten(0, 1).double(),
                         False, lambda a, b: (a[:, None] == b).double())
    if rows < num_embeddings:  # their ranks will do
        values, order = indices.flatten().sort()
        ranks = torch.cat([values.new_zeros(1), (values.diff() != 0).cumsum(0)])
        indices = torch.empty_like(ranks).index_copy_(0, order, ranks).view_as(indices)
    place = (torch.arange(samples, device=g.device)[:, None], indices)
    columns = max(1, min(d, _outer.MAX_BYTES // 8 // (samples * rows)))
    for c in range(0, d, columns):
        part = g[:, :, c:c + columns].double()
        sums = part.new_zeros(samples, rows, part.shape[-1]).index_put_(place, part, accumulate=True)
        out += gram(sums.flatten(1))
    return out


@allow_in_graph
def gram_affine(x: Tensor, g: Tensor, *, bias: bool = True, out: Tensor | None = None) -> Tensor:
    r"""Inner products of the per-sample gradients of an elementwise scale and shift, as of a normalisation.

    The gradient of the scale is :math:`\sum_t g_{at} \circ x_{at}`, with x the normalised input, and that of the shift
    :math:`\sum_t g_{at}`.

    Args:
        x: ``(B, n)`` or ``(B, T, n)``; float64, float32, bfloat16 or float16.
        g: like ``x``.
        bias: there is a shift.
        out: ``(B, B)``, float64; the Gram is **added** to it.

    Returns:
        ``(B, B)``, float64, symmetric to the bit; ``out`` where it was given.

    Raises:
        TypeError: ``x`` or ``g`` is no dense real floating-point tensor, or ``out`` is not float64.
        ValueError: shapes or devices do not fit.
        RuntimeError: a derivative is asked for.

    Example:
        >>> import torch
        >>> from gradops.linalg import gram_affine
        >>> gram_affine(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
        tensor([[23.]], dtype=torch.float64)
    """
    check_pair(x, g)
    if g.shape != x.shape:
        raise ValueError(f"g must have the shape of x, {tuple(x.shape)}, got {tuple(g.shape)}")
    out = check_out(out, x.shape[0], x)
    refuse_derivative("gram_affine", x=x, g=g, out=out)
    if x.dim() == 2:
        x, g = x[:, None], g[:, None]
    out += gram((x.double() * g).sum(1))
    return out.add_(gram(g.sum(1, dtype=torch.float64))) if bias else out
