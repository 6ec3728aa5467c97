"""Per-sample gradients of layers, formed one by one, and what is made of them."""
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

Pair = int | tuple[int, int]


def _added(rows: list[Tensor], like: Tensor, out: Tensor | None) -> Tensor:
    J = torch.stack(rows) if rows else like.new_zeros(0, 0)
    G = J.double() @ J.double().mT
    return G if out is None else out.add_(G)


def _linear(x: Tensor, g: Tensor, bias: bool) -> list[Tensor]:
    """The gradient of each sample, weight first, as one vector."""
    rows = []
    for a, b in zip(x.double(), g.double(), strict=True):
        a, b = torch.atleast_2d(a), torch.atleast_2d(b)
        rows.append(torch.cat([(b.mT @ a).flatten(), b.sum(0) if bias else b.new_zeros(0)]))
    return rows


def gram_outer(x: Tensor, g: Tensor, *, bias: bool = True, mode: str = "auto", out: Tensor | None = None) -> Tensor:
    """`mode` makes no difference here."""
    return _added(_linear(x, g, bias), x, out)


def gram_conv2d(x: Tensor, g: Tensor, kernel_size: Pair, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1,
                groups: int = 1, bias: bool = True, mode: str = "auto", out: Tensor | None = None) -> Tensor:
    """`mode` makes no difference here."""
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    shape = (g.shape[-3], x.shape[-3] // groups, *kernel)
    rows = []
    for a, b in zip(x.double(), g.double(), strict=True):
        a, b = a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *b.shape[-3:])
        weight = conv2d_weight(a, shape, b, stride, padding, dilation, groups)
        rows.append(torch.cat([weight.flatten(), b.sum((0, 2, 3)) if bias else b.new_zeros(0)]))
    return _added(rows, x, out)


def gram_embedding(indices: Tensor, g: Tensor, num_embeddings: int, *, padding_idx: int | None = None,
                   mode: str = "auto", out: Tensor | None = None) -> Tensor:
    """`mode` makes no difference here."""
    rows = []
    for i, b in zip(indices, g.double(), strict=True):
        hot = F.one_hot(i.reshape(-1).long(), num_embeddings).double()
        if padding_idx is not None:
            hot[:, padding_idx] = 0
        rows.append((hot.mT @ b.reshape(-1, g.shape[-1])).flatten())
    return _added(rows, g, out)


def gram_affine(x: Tensor, g: Tensor, *, bias: bool = True, out: Tensor | None = None) -> Tensor:
    rows = []
    for a, b in zip(x.double(), g.double(), strict=True):
        a, b = a.reshape(-1, x.shape[-1]), b.reshape(-1, x.shape[-1])
        rows.append(torch.cat([(a * b).sum(0), b.sum(0) if bias else b.new_zeros(0)]))
    return _added(rows, x, out)


def outer_vjp(x: Tensor, g: Tensor, w: Tensor, *, bias: bool = True,
              out: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor | None]:
    p, d = g.shape[-1], x.shape[-1]
    total = sum((a * row for a, row in zip(w.double(), _linear(x, g, True), strict=True)),
                x.new_zeros(p * d + p, dtype=torch.float64))
    if out is None:
        return total[:p * d].view(p, d), total[p * d:] if bias else None
    out[0].add_(total[:p * d].view(p, d))
    if out[1] is not None:
        out[1].add_(total[p * d:])
    return out


def outer_jvp(x: Tensor, g: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    v = torch.cat([V.double().flatten(), V.new_zeros(0) if bias is None else bias.double()])
    return torch.stack([row @ v for row in _linear(x, g, bias is not None)])


def per_sample_stats(x: Tensor, g: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor]:
    J = torch.stack(_linear(x, g, bias))
    return J.square().sum(1), J @ J.mean(0)
