"""Newton-Schulz iteration towards the polar factor, as one kernel per call."""
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._checks import check_matrix
from .._compiler import allow_in_graph
from .._op import needs_derivative, register
from .._precision import matmul_precision, matmul_precision_for
from .coefficients import Coefficients, resolve, with_margin

_PRECISIONS = ("highest", "high", "medium")
_FULL, _BF16X3, _BF16 = 0, 1, 2  # NewtonSchulzProducts in csrc/linalg/newton_schulz.h

_RESTART = 3  # polynomials that the Gram form takes together in float32

_op = register("newton_schulz", fake=lambda x, coefficients, normalize, products, restart=0: torch.empty_like(
    x, memory_format=torch.contiguous_format))


@allow_in_graph
def newton_schulz(x: Tensor, steps: int = 5, *, coefficients: str | Sequence[Sequence[float]] = "polar_express",
                  form: str = "auto", eps: float = 1e-7, precision: str | None = None) -> Tensor:
    r"""Moves the singular values of each matrix towards 1 by odd polynomials: a cheap stand-in for its polar factor.

    .. math:: X_0 = \frac{x}{(1 + \epsilon)\,\|x\|_F}, \qquad A = X_k X_k^\top, \qquad
              X_{k+1} = a_k X_k + (b_k A + c_k A^2) X_k

    With :math:`x = U \Sigma V^\top` the result is :math:`U p(\Sigma) V^\top`. The Gram matrix is taken on the short
    side. The result does not depend on the scale of ``x``; a zero matrix stays zero; a NaN or infinity makes its
    own matrix NaN and no other.

    Args:
        x: ``(..., m, n)``; float64, float32, bfloat16 or float16. Not modified.
        steps: number of polynomials, 1 to 32.
        coefficients: ``"polar_express"`` (arXiv 2505.16932, Algorithm 1, safety factor 1.01), ``"simple"`` (Muon,
            does not converge to 1), ``"quintic"``, ``"cans"`` (arXiv 2506.10935, with a safety factor of 1.01),
            ``"aol"`` (Turbo-Muon: rows are first weighted by :math:`(\sum_j |A_{ij}|)^{-1/2}`), ``"deepseekv4"``
            (``simple`` and two converging steps at the end; published with ``steps=10``), ``"cubic5"``
            (:math:`c = 0`), or a sequence of ``(a, b, c)``, one per step. The last triple of a shorter list repeats.
        form: ``"standard"`` iterates :math:`X`. ``"gram"`` iterates on the short side's Gram matrix and goes back to
            :math:`X` often enough to stay bounded in ``x.dtype``: fewer operations for elongated matrices, but in
            float32 the relative error grows from about 5e-6 to 1e-4 at condition number 1000. ``"auto"`` takes
            ``"gram"`` where ``max(m, n) >= 4 * min(m, n)``, except for float64, for float32 at ``"highest"``, and where
            a kernel of this library multiplies in bfloat16 or does it in one launch on CUDA.
        eps: relative safety margin of the norm.
        precision: of products of float32 input: ``"highest"`` float32, ``"high"`` at least three bfloat16 products
            (or TensorFloat-32), ``"medium"`` at least bfloat16. None: as torch is set for that
            device, by ``torch.set_float32_matmul_precision`` or ``torch.backends.cuda.matmul.fp32_precision`` (on CPU
            ``torch.backends.mkldnn.matmul.fp32_precision``). Other dtypes compute in their own precision or better,
            with sums in at least float32. In a graph of ``torch.compile``, products that are torch's own (for
            derivatives, and of large matrices on CUDA) are as torch is set when it runs.

    Returns:
        A new tensor like ``x``.

    Raises:
        TypeError: ``x`` is no dense real floating-point tensor; ``steps`` is no int; ``coefficients`` no triples.
        ValueError: ``x`` has fewer than 2 dimensions; ``steps``, ``coefficients``, ``form``, ``eps`` or
            ``precision`` is not one of those above.

    With ``s = min(m, n)``, ``l = max(m, n)``: ``3 s^2 l + s^3`` multiplications and additions per step on CPU, where
    the kernels compute symmetric products once; ``4 s^2 l + 2 s^3`` with plain products. Differentiable to any order:
    a call that needs a derivative runs on torch's own products.

    Example:
        >>> import torch
        >>> from gradops.linalg import newton_schulz
        >>> g = torch.randn(3, 64, 256)
        >>> s = torch.linalg.svdvals(newton_schulz(g, steps=8))
        >>> bool((s - 1).abs().max() < 1e-3)
        True
    """
    check_matrix(x, "x")
    if form not in ("auto", "standard", "gram"):
        raise ValueError(f"form must be 'auto', 'standard' or 'gram', got {form!r}")
    if precision is not None and precision not in _PRECISIONS:
        raise ValueError(f"precision must be 'highest', 'high', 'medium' or None, got {precision!r}")
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")
    table = resolve(coefficients, steps)
    precision = precision or matmul_precision_for(x)
    aol = coefficients == "aol"
    if not aol:
        table = with_margin(table, eps)
    products = None if needs_derivative(x) else _kernel_products(x, steps, precision)
    # Small singular values lose digits in the Gram form: not for those who ask for all of them.
    exact = x.dtype == torch.float64 or (x.dtype == torch.float32 and precision == "highest")
    elongated = max(x.shape[-2:]) >= 4 * min(x.shape[-2:])
    gram = form == "gram" or (form == "auto" and elongated and not exact and products in (None, _FULL)
                              and not needs_derivative(x))
    if products is not None and (x.is_cpu or not gram):
        # The kernel of the Gram form computes in float32 for 16-bit input as well.
        return _op(_aol(_normalize(x)) if aol else x, [k for abc in table for k in abc], not aol,
                   _FULL if gram else products, _RESTART if gram else 0)
    return _with_products(x, table, precision, aol, _gram_steps if gram else _standard_steps)


def polynomials(x: Tensor, table: Coefficients) -> Tensor:
    """The steps alone, in x's precision, for x in float32 or float64 with singular values of at most 1."""
    if (products := _kernel_products(x, len(table), "highest")) is not None:
        return _op(x, [k for abc in table for k in abc], False, products)
    return _standard_steps(x.flatten(0, -3), table).reshape(x.shape)


@functools.cache
def _level() -> str:
    return torch.ops.gradops.isa()


def _kernel_products(x: Tensor, steps: int, precision: str) -> int | None:
    """How the kernel should multiply, or None where torch's products are used."""
    if x.device.type == "cpu":
        level = _level()
        if level in ("v2", "v3", "v4") or x.dtype in (torch.float64, torch.float16):
            return _FULL
        if x.dtype == torch.bfloat16 or precision == "medium":
            # Blocks of bfloat16 are 32 wide: much narrower matrices take no longer in float32, and errors of bfloat16
            # would be the larger the fewer singular values share the norm.
            return _BF16 if min(x.shape[-2:]) > 24 else _FULL
        # Without tiles, three bfloat16 products cost more than one in float32.
        return _BF16X3 if precision == "high" and level.startswith("amx") else _FULL
    if x.device.type == "cuda" and x.dtype != torch.float64 and min(x.shape[-2:]) <= 256:
        by_precision = {"highest": _FULL, "high": _BF16X3, "medium": _BF16}
        products = by_precision[precision] if x.dtype == torch.float32 else _BF16  # 16 bits: in their own type
        return products if _one_launch_pays(x, steps, products) else None
    return None


def _one_launch_pays(x: Tensor, steps: int, products: int) -> bool:
    """The CUDA kernel gives a matrix to one multiprocessor; torch gives it to all, in several launches per step.

    The rates (FLOP/s of one multiprocessor) and the cost of a launch are estimates, good to a factor of two or so.
    """
    short, long = sorted(x.shape[-2:])
    batch = x.numel() // max(short * long, 1)
    waves = -(-batch // torch.cuda.get_device_properties(x.device).multi_processor_count)
    rate = {_BF16: 3e12, _BF16X3: 1e12, _FULL: 2.5e11}[products]
    kernel = waves * 2 * steps * (3 * short * short * long + short**3) / rate
    return kernel < (4 * steps + 6) * 5e-6


def _normalize(x: Tensor) -> Tensor:
    """x / ||x||_F, at any scale; 16-bit input comes back as float32."""
    if x.numel() == 0:
        return x
    y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    big = y.detach().abs().amax((-2, -1), keepdim=True)
    y = y / torch.where(big == 0, 1, big)
    norm = (y * y).sum((-2, -1), keepdim=True)
    return y / torch.where(norm == 0, 1, norm).sqrt()


def _aol(x: Tensor) -> Tensor:
    """Rows of the short side weighted so that no singular value exceeds 1 (Prach and Lampert's bound)."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    sums = (y @ y.mT).abs().sum(-1, keepdim=True)
    y = y * torch.where(sums == 0, 0, torch.where(sums == 0, 1, sums).rsqrt())
    return y.mT if tall else y


def _with_products(x: Tensor, table: Coefficients, precision: str, aol: bool,
                   steps: Callable[[Tensor, Coefficients], Tensor]) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    tall = x.shape[-2] > x.shape[-1]
    with matmul_precision(precision):
        y = _normalize(x.mT if tall else x)
        y = (_aol(y) if aol else y).flatten(0, -3) if x.dim() > 2 else (_aol(y) if aol else y)[None]
        low = torch.bfloat16 if x.dtype == torch.float32 and precision == "medium" else x.dtype
        y = steps(y.to(low), table).to(x.dtype)
    y = y.reshape(x.mT.shape if tall else x.shape)
    return y.mT.contiguous() if tall else y


def _standard_steps(x: Tensor, table: Coefficients) -> Tensor:
    for a, b, c in table:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram, x, beta=a)
    return x


def _gram_steps(x: Tensor, table: Coefficients) -> Tensor:
    """Q collects the polynomials of R = X X^T. Rounding errors of R grow with the polynomials' slope at 0, so X is
    brought up to date, and R made anew, every second step in 16 bits and every third otherwise."""
    every = 2 if x.dtype in (torch.bfloat16, torch.float16) else 3
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for start in range(0, len(table), every):
        chunk = table[start:start + every]
        r = x @ x.mT
        q: Tensor | None = None
        for i, (a, b, c) in enumerate(chunk):
            p = torch.baddbmm(r, r, r, beta=b, alpha=c) if c else b * r
            p = p + a * identity
            q = p if q is None else p @ q
            if i + 1 < len(chunk):
                r = p @ r @ p
        if q is not None:
            x = q @ x
    return x
