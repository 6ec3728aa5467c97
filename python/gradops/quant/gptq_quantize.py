"""Quantisation of weights with second-order compensation: GPTQ, GPTAQ and FOEM."""
import math

import torch
from torch import Tensor

from .._checks import check_one_of
from .._compiler import allow_in_graph
from .._op import refuse_derivative
from ._columns import (
    GRIDS,
    METHODS,
    MOST_BLOCK,
    SCALE_DTYPES,
    QuantizedWeight,
    check_grid,
    check_scales,
    check_square,
    column_order,
    nvfp4_unit,
    one_block_ahead,
)  # fmt: skip
from ._drift import drift_of
from .gptq_block import gptq_block
from .gptq_columns import gptq_columns
from .hessian_factor import hessian_factor


@allow_in_graph
def gptq_quantize(
    W: Tensor, H: Tensor, *, bits: int = 4, group_size: int = 128, sym: bool = True, desc_act: bool = False,
    static_groups: bool = False, act_group_aware: bool = False, scales: Tensor | None = None,
    zeros: Tensor | None = None, mse: float = 0.0, block_size: int = 128, method: str = "gptq", alpha: float = 0.25,
    beta: float = 0.2, D: Tensor | None = None, grid: str = "int", group_params: str = "fresh",
    pull_across_blocks: bool = False, compat: str | None = None, damp_percent: float = 0.01,
    damp_auto_increment: float = 0.0, factor_dtype: torch.dtype | None = None, factor: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:  # fmt: skip
    r"""Quantises a weight column by column, moving what rounding loses onto the columns still to come.

    With :math:`U` upper triangular, :math:`U^\top U = (H + \lambda I)^{-1}`, and :math:`W^0` the given weight, column
    :math:`j` is rounded to :math:`Q_j` and then

    .. math::
        E_j = \frac{(W_j - Q_j) - \beta (W_j - W^0_j)}{U_{jj}}, \qquad
        W_{k} \leftarrow W_{k} - E_j U_{jk} + W_j P_{jk} \quad (k > j)

    with :math:`\beta = 0` and :math:`P = 0` for GPTQ. FOEM takes :math:`\beta > 0` and, before a column is rounded,
    pulls it back by :math:`W_j \leftarrow W_j - \beta (W_j - W^0_j)`; GPTAQ takes
    :math:`P = \alpha\, \mathrm{triu}(D U^\top, 1)\, U`. Columns go in blocks of ``block_size``: inside a block by one
    kernel, between blocks by float32 products (never TensorFloat-32). Where no group is wider than a block (or one is
    the whole row), the factor is :math:`R` with :math:`H + \lambda I = R R^\top` and the same numbers come from
    :math:`R` and inverses of its diagonal blocks.

    Args:
        W: ``(..., out, in)``; leading dimensions are independent matrices (experts). Not modified.
        H: ``(..., in, in)`` or ``(in, in)`` for all, float64 or float32: ``(2/n) X'X`` of the inputs.
        bits: 2 to 8.
        group_size: inputs that share a scale; -1: all of them. The last group may be shorter.
        sym: the zero point is ``2^(bits-1)``, and a scale :math:`(1 - 2^{-19})\, 2 \max|w| / (2^{bits} - 1)`: the
            lowest number of a group, halfway between two codes but for the first factor, gets the lowest code whatever
            rounding does to it (a coarser ``scale_dtype`` goes without). Otherwise each scale gets a zero point.
        desc_act: inputs with the largest ``H_ii`` first; groups are then of inputs that follow each other in that
            order.
        static_groups: scales are chosen from ``W`` before anything moves, for groups of neighbouring inputs.
        act_group_aware: the largest ``H_ii`` first inside every group, and the groups by their largest (GAR,
            arXiv 2505.14638): most of what ``desc_act`` gains, with groups of neighbours.
        scales, zeros: ``(..., out, groups)``: scales to use in place of chosen ones; ``zeros`` default to
            ``2^(bits-1)``.
        mse: 0, or the exponent :math:`p` of the error :math:`\sum |w - q|^p` that each scale minimises over 80 shrunk
            ranges (2.4 in the GPTQ authors' code).
        block_size: 1 to 128. With ``group_params="fresh"`` a block ends where a group does.
        method: ``"gptq"``, ``"gptaq"``, ``"foem"`` or ``"foem+gptaq"``.
        alpha: GPTAQ's factor before :math:`P`.
        beta: FOEM's; with 0 it is GPTQ, code for code.
        D: for GPTAQ, ``(2/n) (X_fp - X_q) X_q'``, with inputs of the full-precision and the quantised network.
        grid: ``"int"``; ``"nvfp4"``: FP4 with scales that are E4M3 multiples of ``max|W| / 2688``; ``"mxfp4"``: FP4
            with powers of two (their usual ``group_size`` is 16 and 32).
        group_params: ``"fresh"``: scales of a group from its columns as they are when its first is reached;
            ``"block"``: as they were when the block began, which is what most implementations do.
        pull_across_blocks: FOEM also pulls the first column of every block. As printed (Algorithm 1), it does not.
        compat: None, or ``"authors"``: groups of numbers ``>= 0`` with ``sym`` span ``[0, max]`` as in the GPTQ
            authors' code (and clip above half of it), and between blocks GPTAQ takes the rounded :math:`Q_j` for
            :math:`W_j` as in its authors' code.
        damp_percent, damp_auto_increment, factor_dtype: as in :func:`hessian_factor`.
        factor: :math:`U` itself, for several weights with the same inputs, in the order in which columns are taken.
        scale_dtype: scales are rounded to this (float32, float16 or bfloat16) before they are used, so that
            compensation sees the grid that a checkpoint holds. A scale is at least the smallest such number.

    Returns:
        :class:`QuantizedWeight`. ``loss`` is :math:`\sum_j (W_j - Q_j)^2 / (2 U_{jj}^2)` per row. ``info`` is 0;
        ``-k`` if ``k`` inputs were never seen (``H_ii = 0``): they get weight 0, as in the GPTQ authors' code; or why
        an item was rounded to nearest without compensation: 1 ``H`` is not positive definite after damping, 2 ``H`` is
        not finite, 3 no input was ever seen. A row of ``W`` that is not finite gives NaN in its ``weight`` and
        ``loss``, and no other row.

    Raises:
        TypeError: a tensor has the wrong dtype. ValueError: a shape or an option is wrong.
        RuntimeError: a derivative is asked for: rounding has none.

    Sources: GPTQ, arXiv 2210.17323; GPTAQ, arXiv 2504.02692, Theorem 4.2; FOEM, arXiv 2507.11017v2, Algorithm 1.
    Results do not depend on the number of threads, and on the CPU an item of a batch gets the codes that it gets alone.
    Multiplications: ``in^3 / 6`` for :math:`R`, ``in^3 / 3`` for :math:`U`, ``out in^2 / 2`` for the products between
    blocks (twice that and ``in^3 / 6`` more for GPTAQ), ``out in block_size / 2`` inside blocks.

    Example:
        >>> import torch
        >>> from gradops.quant import gptq_quantize
        >>> X = torch.randn(256, 64) @ torch.randn(64, 64)
        >>> q = gptq_quantize(torch.randn(8, 64), 2 / 256 * X.T @ X, group_size=32)
        >>> q.codes.dtype, q.scales.shape, int(q.info)
        (torch.uint8, torch.Size([8, 2]), 0)
    """
    group = check_grid(W, bits, group_size, mse, grid, scale_dtype)
    check_scales(W, scales, zeros, group)
    check_square(H, "H", W)
    _check_options(W, D, factor, desc_act, act_group_aware, block_size, method, group_params, compat)
    refuse_derivative("gptq_quantize", W=W, H=H, D=D, scales=scales, zeros=zeros, factor=factor)

    lead, (rows, n) = W.shape[:-2], W.shape[-2:]
    items = math.prod(lead)
    foem, gptaq = method.startswith("foem") and beta != 0, method.endswith("gptaq") and alpha != 0

    def square(x: Tensor) -> Tensor:
        x = x.detach() if x.dtype == torch.float64 else x.detach().float()
        return (x if x.dim() == 2 else x.reshape(items, n, n)).expand(items, n, n)

    h = square(H)
    diagonal = h.diagonal(0, -2, -1)
    dead = diagonal == 0
    unseen = dead.all(-1)
    order = column_order(diagonal + dead, group, desc_act, act_group_aware)
    # R in place of U = R^-1 saves an inversion, where every block needs scales of its own columns only.
    inverse = factor is not None or not (
        static_groups or scales is not None or one_block_ahead(n, group, block_size, group_params == "fresh"))
    if factor is None:
        once = slice(1 if H.dim() == 2 else None)  # one Hessian for all is factored once
        u, _, info = hessian_factor(_in_order(h[once], None if order is None else order[once]),
                                    damp_percent=damp_percent, damp_auto_increment=damp_auto_increment,
                                    factor_dtype=factor_dtype, inverse=inverse)  # fmt: skip
        u, info = u.expand(h.shape), info.expand(items)
    else:
        u, info = square(factor), torch.where(unseen, 3, -dead.sum(-1)).int()
    u = u.float()
    w = W.detach().reshape(items, rows, n).float()
    empty = dead & (info <= 0)[:, None]
    if static_groups or grid == "nvfp4":  # something is chosen from w before the walk
        w = w.masked_fill(empty[:, None], 0.0)
    options = (bits, sym, compat == "authors", mse, GRIDS.index(grid), SCALE_DTYPES.index(scale_dtype))
    unit = nvfp4_unit(w) if grid == "nvfp4" else None
    given = _given_scales(w, scales, zeros, static_groups, order, group, options, unit)
    drift = None
    if gptaq and D is not None:
        drift = drift_of(_in_order(square(D).float(), order), u, inverse, alpha)
        drift.masked_fill_((info > 0)[:, None, None], 0.0)
    if order is not None:
        w, empty = w.take_along_dim(order[:, None], -1), empty.take_along_dim(order, -1)
    codes, q, loss, scale, zero = gptq_columns(
        w, empty, u, inverse, drift, *(given or (None,) * 3), unit, group, block_size, group_params == "fresh",
        *options, beta if foem else 0.0, pull_across_blocks, compat == "authors",
    )  # fmt: skip
    g_idx = (torch.arange(n, device=w.device) // group).expand(items, n)
    if given is not None:
        scale, zero = given[:2]
    if order is not None:
        back = order.argsort(-1)
        codes, q = codes.take_along_dim(back[:, None], -1), q.take_along_dim(back[:, None], -1)
        if given is None and desc_act:
            g_idx = back // group
        elif given is None:  # groups of neighbours, met in another order
            where = (order[:, ::group] // group).argsort(-1)[:, None].expand(scale.shape)
            scale, zero = scale.take_along_dim(where, -1), zero.take_along_dim(where, -1)
    results = codes, scale, zero, g_idx.int(), q.to(W.dtype), loss, info
    return QuantizedWeight(*(x.reshape((*lead, *x.shape[1:])) for x in results))


@allow_in_graph
def rtn_quantize(
    W: Tensor, *, bits: int = 4, group_size: int = 128, sym: bool = True, scales: Tensor | None = None,
    zeros: Tensor | None = None, mse: float = 0.0, grid: str = "int", compat: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:  # fmt: skip
    """Rounds a weight to the nearest numbers of its grid, without compensation.

    Arguments and result as in :func:`gptq_quantize`; ``loss`` is half the squared error of each row, ``info`` is 0.

    Example:
        >>> import torch
        >>> from gradops.quant import rtn_quantize
        >>> rtn_quantize(torch.tensor([[-7.5, 0.2, 3.0]]), bits=4).codes
        tensor([[ 0,  8, 11]], dtype=torch.uint8)
    """
    group = check_grid(W, bits, group_size, mse, grid, scale_dtype)
    check_scales(W, scales, zeros, group)
    check_one_of(compat, "compat", (None, "authors"))
    refuse_derivative("rtn_quantize", W=W, scales=scales, zeros=zeros)
    w = W.detach().float()
    n = w.shape[-1]
    g_idx = (torch.arange(n, device=w.device) // group).expand(*w.shape[:-2], n)
    options = (bits, sym, compat == "authors", mse, GRIDS.index(grid), SCALE_DTYPES.index(scale_dtype))
    unit = nvfp4_unit(w) if grid == "nvfp4" else None
    given = None if scales is None else (*_scales_of(scales, zeros, bits), g_idx)
    codes, q, _, _, scale, zero, loss = gptq_block(w, None, None, None, *(given or (None,) * 3), unit, group, *options,
                                            0.0, False, False)  # fmt: skip
    if given is not None:
        scale, zero = given[:2]
    q = q.masked_fill_(~loss.isfinite()[..., None], torch.nan).to(W.dtype)
    return QuantizedWeight(codes, scale, zero, g_idx.int(), q, loss, loss.new_zeros(w.shape[:-2], dtype=torch.int32))


def _check_options(W: Tensor, D: Tensor | None, factor: Tensor | None, desc_act: bool, act_group_aware: bool,
                   block_size: int, method: str, group_params: str, compat: str | None) -> None:
    check_one_of(method, "method", METHODS)
    check_one_of(group_params, "group_params", ("fresh", "block"))
    check_one_of(compat, "compat", (None, "authors"))
    if not 1 <= block_size <= MOST_BLOCK:
        raise ValueError(f"block_size must be 1 to {MOST_BLOCK}, got {block_size}")
    if desc_act and act_group_aware:
        raise ValueError("desc_act and act_group_aware are two orders of the columns, got both")
    if method.endswith("gptaq") and D is None:
        raise ValueError(f"method={method!r} needs D, got None")
    if not method.endswith("gptaq") and D is not None:
        raise ValueError(f"D goes with method='gptaq' or 'foem+gptaq', got method={method!r}")
    for x, name in ((D, "D"), (factor, "factor")):
        if x is not None:
            check_square(x, name, W)


def _in_order(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.take_along_dim(order[:, :, None], -2).take_along_dim(order[:, None, :], -1)


def _scales_of(scales: Tensor, zeros: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    scale = scales.detach().float()
    return scale, torch.full_like(scale, 2.0 ** (bits - 1)) if zeros is None else zeros.detach().float()


def _given_scales(w: Tensor, scales: Tensor | None, zeros: Tensor | None, static: bool, order: Tensor | None,
                  group: int, options: tuple, unit: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Scales and zeros known before the first column, and the group of every column in the order they are taken."""
    items, rows, n = w.shape
    if scales is not None:
        scale, zero = (x.reshape(items, rows, -1) for x in _scales_of(scales, zeros, options[0]))
    elif static:
        scale, zero = gptq_block(w, *(None,) * 6, unit, group, *options, 0.0, False, False)[4:6]
    else:
        return None
    places = torch.arange(n, device=w.device).expand(items, n) if order is None else order
    return scale, zero, places // group
