"""Running sums over calibration tokens: the Hessian of a linear layer, and GPTAQ's cross term."""
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_one_of, check_tensor
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register

_update = register("hessian_update_", fake=lambda H, X, n_seen, mask, split: torch.empty_like(n_seen), vmap=False)
_cross = register("gptaq_cross_update_", fake=lambda D, X_fp, X_q, n_seen, mask, split: torch.empty_like(n_seen),
                  vmap=False)  # fmt: skip

_PRECISIONS = ("highest", "high")


def hessian_update_(H: Tensor, X: Tensor, n_seen: int | Tensor, *, mask: Tensor | None = None,
                    precision: str = "highest") -> int | Tensor:
    r"""Adds a batch of a layer's inputs to the running mean that is the layer's Hessian, in place.

    .. math:: H \leftarrow \frac{n}{n'} H + \frac{2}{n'} \sum_t X_t X_t^\top, \qquad n' = n + \#\{t\}

    :math:`n` counts **tokens** (rows of ``X``), so the result does not depend on how tokens were cut into batches.
    (The code of the GPTQ paper counts calibration sequences instead: the same ``H`` times the mean length of a
    sequence.) Half of the symmetric product is computed and mirrored, so ``H`` is exactly symmetric.

    Args:
        H: ``(*batch, N, N)``; float32 or float64, symmetric: only the part on and below the diagonal is read.
            Modified. Zeros to begin with. ``batch`` dimensions (experts) are updated independently.
        X: ``(*batch, *tokens, N)``, rows are tokens; bfloat16, float16, float32, or float64 with a float64 ``H``.
            Any number of token dimensions; none is one token, zero tokens change nothing.
        n_seen: :math:`n`, tokens in ``H`` so far: an int, or an int64 tensor of shape ``batch``.
        mask: bool, ``(*batch, *tokens)``: which tokens count (default: all). What the others hold does not matter.
        precision: of products of float32 and float16 input. ``"highest"``: in float32, in sums of 256 tokens that are
            added in ``H.dtype``. ``"high"``: each number as the sum of two bfloat16, three products: relative errors of
            about 1e-5, on processors with AMX, elsewhere the same as ``"highest"``. bfloat16 input is always multiplied
            as it is, with float32 sums (of 1024 tokens, or 256 with a float64 ``H``, on processors that multiply
            bfloat16).

    Returns:
        :math:`n'`: an int where ``n_seen`` is one and there is no mask, else an int64 tensor of shape ``batch``.

    Raises:
        TypeError: an argument is no tensor of the dtypes above.
        ValueError: shapes or devices do not fit, ``n_seen`` is negative (a CUDA tensor is not checked), ``precision``
            is neither of the above.
        RuntimeError: a derivative is asked for.

    A NaN or infinity in a feature of a token that counts makes that row and column of its own ``H`` NaN, and nothing
    else; :func:`hessian_factor` finds it. Results do not depend on the number of threads or on other batch items.
    :math:`N^2 \#\{t\}` multiplications and additions.

    Frantar et al., GPTQ (arXiv 2210.17323), section 3: the Hessian of :math:`\|W X - \hat W X\|^2`.

    Example:
        >>> import torch
        >>> from gradops.quant import hessian_update_
        >>> H, n = torch.zeros(2, 2), 0
        >>> for X in torch.tensor([[[1.0, 0.0]], [[1.0, 2.0]]]):
        ...     n = hessian_update_(H, X, n)
        >>> n, H
        (2, tensor([[2., 2.],
                [2., 4.]]))
    """
    batch = _check_matrix(H, "H")
    _check_tokens(X, "X", H, "H")
    return _call(False, (H, X), n_seen, mask, precision, batch)


def gptaq_cross_update_(D: Tensor, X_fp: Tensor, X_q: Tensor, n_seen: int | Tensor, *, mask: Tensor | None = None,
                        precision: str = "highest") -> int | Tensor:
    r"""Adds a batch to the running cross term of GPTAQ, in place.

    .. math:: D_{ij} \leftarrow \frac{n}{n'} D_{ij} + \frac{2}{n'} \sum_t (X^{fp}_{ti} - X^q_{ti}) X^q_{tj},
              \qquad n' = n + \#\{t\}

    ``X_fp`` is a layer's input in the full-precision model, ``X_q`` in the model whose earlier layers are quantised.
    The difference is made in float32 (float64 for float64 input), before anything is rounded. This is
    :math:`\Delta X X^\top` of the paper, whose matrices hold a token per column; for weights ``(rows, N)`` the
    compensation is :math:`P = \alpha\, \mathrm{triu}(D U^\top, 1)\, U`.

    Args:
        D: ``(*batch, N, N)``; float32 or float64. Modified. Zeros to begin with.
        X_fp, X_q: ``(*batch, *tokens, N)``, of one shape and dtype, as ``X`` of :func:`hessian_update_`.
        n_seen: tokens in ``D`` so far: an int, or an int64 tensor of shape ``batch``.
        mask: bool, ``(*batch, *tokens)``: which tokens count (default: all).
        precision: ``"highest"``: products in float32. ``"high"``: the difference as the sum of two bfloat16 (so is
            float32 and float16 ``X_q``), two or three products, on processors with AMX.

    Returns:
        :math:`n'`: an int where ``n_seen`` is one and there is no mask, else an int64 tensor of shape ``batch``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`hessian_update_`.

    :math:`2 N^2 \#\{t\}` multiplications and additions: twice those of :func:`hessian_update_`.

    Li et al., GPTAQ (arXiv 2504.02692), theorem 4.2; the factor 2/n, as in the authors' code.

    Example:
        >>> import torch
        >>> from gradops.quant import gptaq_cross_update_
        >>> D = torch.zeros(2, 2)
        >>> gptaq_cross_update_(D, torch.tensor([[1.5, 2.0]]), torch.tensor([[1.0, 2.0]]), 0)
        1
        >>> D
        tensor([[1., 2.],
                [0., 0.]])
    """
    batch = _check_matrix(D, "D")
    _check_tokens(X_fp, "X_fp", D, "D")
    _check_tokens(X_q, "X_q", D, "D")
    if X_q.shape != X_fp.shape:
        raise ValueError(f"X_q must have the shape of X_fp, {tuple(X_fp.shape)}, got {tuple(X_q.shape)}")
    if X_q.dtype != X_fp.dtype:
        raise TypeError(f"X_q must have the dtype of X_fp, {X_fp.dtype}, got {X_q.dtype}")
    return _call(True, (D, X_fp, X_q), n_seen, mask, precision, batch)


def _check_matrix(H: Any, name: str) -> torch.Size:
    check_tensor(H, name)
    if H.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {H.dtype}")
    if H.dim() < 2 or H.shape[-1] != H.shape[-2]:
        raise ValueError(f"{name} must have shape (*batch, N, N), got {tuple(H.shape)}")
    return H.shape[:-2]


def _check_tokens(X: Any, name: str, H: Tensor, other: str) -> None:
    check_floating(X, name)
    check_device(X, name, H, other)
    batch, n = H.shape[:-2], H.shape[-1]
    if X.dim() < len(batch) + 1 or X.shape[:len(batch)] != batch or X.shape[-1] != n:
        expected = "".join(f"{d}, " for d in batch) + f"*tokens, {n}"
        raise ValueError(f"{name} must have shape ({expected}) to go with {other} of shape {tuple(H.shape)}, "
                         f"got {tuple(X.shape)}")
    if X.dtype == torch.float64 and H.dtype != torch.float64:
        raise TypeError(f"{other} must be float64 where {name} is, got {H.dtype}")


def _call(cross: bool, tensors: tuple[Tensor, ...], n_seen: int | Tensor, mask: Tensor | None, precision: str,
          batch: torch.Size) -> int | Tensor:
    H, X = tensors[:2]
    check_one_of(precision, "precision", _PRECISIONS)
    if isinstance(n_seen, Tensor):
        if n_seen.dtype != torch.int64:
            raise TypeError(f"n_seen must be an int or an int64 tensor, got {n_seen.dtype}")
        if n_seen.shape != batch:
            raise ValueError(f"n_seen must have shape {tuple(batch)}, got {tuple(n_seen.shape)}")
        check_device(n_seen, "n_seen", H, "H")
        counts = n_seen
    else:
        if isinstance(n_seen, (bool, float)):
            raise TypeError(f"n_seen must be an int or an int64 tensor, got {type(n_seen).__name__}")
        if n_seen < 0:
            raise ValueError(f"n_seen must not be negative, got {n_seen}")
        counts = torch.full(batch, n_seen, dtype=torch.int64, device=H.device)
    if mask is not None:
        check_tensor(mask, "mask")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.shape != X.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(X.shape[:-1])}, got {tuple(mask.shape)}")
        check_device(mask, "mask", H, "H")
    counts = _run(cross, tensors, counts, mask, precision == "high", len(batch))
    if isinstance(n_seen, Tensor) or mask is not None:
        return counts
    return n_seen + X.shape[len(batch):-1].numel()


@allow_in_graph
def _run(cross: bool, tensors: tuple[Tensor, ...], counts: Tensor, mask: Tensor | None, split: bool,
         dims: int) -> Tensor:
    names = ("D", "X_fp", "X_q") if cross else ("H", "X")
    refuse_derivative("gptaq_cross_update_" if cross else "hessian_update_", **dict(zip(names, tensors, strict=True)))
    H = tensors[0]
    batch, n = counts.numel(), H.shape[-1]
    tokens = tensors[1].shape[dims:-1].numel()
    h = H.view(batch, n, n) if H.is_contiguous() else H.reshape(batch, n, n)
    rows = [x.reshape(batch, tokens, n) for x in tensors[1:]]
    which = None if mask is None else mask.reshape(batch, tokens)
    new = (_cross if cross else _update)(h, *rows, counts.reshape(batch), which, split)
    if not H.is_contiguous():
        H.copy_(h.view(H.shape))
    return new.view(counts.shape)
