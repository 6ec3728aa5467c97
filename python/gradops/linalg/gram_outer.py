"""Gram matrix of a linear layer's per-sample gradients, from its inputs and output gradients."""
from torch import Tensor

from .._checks import check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative
from ._outer import add_blocks, add_layers, check_out, check_pair, pairs_pay


@allow_in_graph
def gram_outer(x: Tensor, g: Tensor, *, bias: bool = True, mode: str = "auto", out: Tensor | None = None) -> Tensor:
    r"""Inner products of the per-sample gradients of a linear layer, which are never formed.

    With inputs :math:`x_{at}` and output gradients :math:`g_{at}` of sample a at token t, the gradient of the weight is
    :math:`A_a = \sum_t g_{at} x_{at}^\top` and that of the bias :math:`\sum_t g_{at}`, and

    .. math:: G_{ab} = \langle A_a, A_b \rangle + \Big\langle \sum_t g_{at}, \sum_s g_{bs} \Big\rangle
                     = \sum_{ts} (g_{at} \cdot g_{bs}) (x_{at} \cdot x_{bs} + 1)

    where the second form (token pairs) costs :math:`T^2 (p + d)` per pair of samples, and the first (sample blocks)
    p d and, for each sample, 2 T p d.

    Args:
        x: ``(B, d)`` or ``(B, T, d)``; float64, float32, bfloat16 or float16.
        g: ``(B, p)`` or ``(B, T, p)``, of any of these dtypes, on the device of ``x``.
        bias: the layer has a bias; without it the second term, the + 1, is left out.
        mode: ``"pairs"``, ``"blocks"``, or ``"auto"`` for token pairs where
            :math:`T^2 (p + d) < 1.25\, p d\, (1 + 2 T / B)`.
        out: ``(B, B)``, float64; the Gram is **added** to it, as the sum over the layers of a network needs it.

    Returns:
        ``(B, B)``, float64, symmetric to the bit; ``out`` where it was given.

    Raises:
        TypeError: ``x`` or ``g`` is no dense real floating-point tensor, or ``out`` is not float64.
        ValueError: shapes or devices do not fit, or ``mode`` is unknown.
        RuntimeError: a derivative is asked for.

    Products and sums are made in float64; temporaries are cut to 64 MiB each, on CPU to 16 MiB. The pair form is the
    "ghost" trick of Goodfellow, arXiv 1510.01799, and Li et al., arXiv 2110.05679, for pairs of samples.

    Example:
        >>> import torch
        >>> from gradops.linalg import gram_outer
        >>> x, g = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [2.0]])
        >>> gram_outer(x, g)
        tensor([[ 6.,  8.],
                [ 8., 40.]], dtype=torch.float64)
    """
    check_pair(x, g)
    check_one_of(mode, "mode", ("auto", "pairs", "blocks"))
    samples = x.shape[0]
    out = check_out(out, samples, x)
    refuse_derivative("gram_outer", x=x, g=g, out=out)
    x, g = (t if t.dim() == 3 else t[:, None] for t in (x, g))
    if mode == "pairs" or (mode == "auto" and pairs_pay(samples, x.shape[1], x.shape[2], g.shape[2])):
        return add_layers(out, [(x, g, bias)])
    return add_blocks(out, x, g, bias)
