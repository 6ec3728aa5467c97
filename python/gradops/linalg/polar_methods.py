"""Ways to the orthonormal polar factor of tall full matrices, and what they share: scale, NaN, rank.

Everything here sees `(b, m, n)` with m >= n >= 1, entries finite and of size one, and runs below autograd.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._precision import matmul_precision, matmul_precision_for
from .coefficients import resolve
from .newton_schulz import _level, newton_schulz, polynomials
from .nuclear_scale import nuclear_scale

METHODS = ("auto", "svd", "qdwh", "zolo", "newton_schulz", "polar_express")

# What an iteration without pivoting may lose before an SVD takes its place: half the relative norm of the skew part of
# U^T A, that is the backward error of A = U H (an SVD's own: 5e-15, 2e-6); and the trace of U^T U - I per column.
_BACKWARD = {torch.float64: 3e-14, torch.float32: 3e-6}
_TRACE = {torch.float64: 1e-14, torch.float32: 1e-6}

SPECTRAL = 128  # from this size on, an estimate of the spectral norm saves more than it costs
SMALL = 100_000  # b m n^2, up to which LAPACK is done before the many small calls of an iteration are


def polar_factor(a: Tensor, method: str, precision: str | None) -> Tensor:
    """U of `(..., m, n)` in float32 or float64, in a's dtype."""
    if a.numel() == 0:
        return torch.empty_like(a, memory_format=torch.contiguous_format)
    u = _tall(a.mT, method, precision).mT if a.shape[-2] < a.shape[-1] else _tall(a, method, precision)
    return u.contiguous()


def _tall(a: Tensor, method: str, precision: str | None) -> Tensor:
    x = a.reshape(-1, *a.shape[-2:])
    # the largest absolute value; torch's norm of that name is 20 times slower
    big = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    usable = torch.isfinite(big) & (big > 0)
    clean = x.is_cpu and bool(usable.all())
    # A power of two: scaling is exact, and the result the same at any scale.
    scale = torch.ldexp(torch.ones_like(big), torch.frexp(torch.where(usable, big, 1)).exponent - 1)
    x = x / scale
    if not clean:
        identity = torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device)
        x = torch.where(usable, x, identity)  # a zero matrix has this factor, and a NaN no longer spreads
    precision = precision or matmul_precision_for(x)
    with matmul_precision("highest"):
        u = _compute(x, method, precision)
    if not clean:
        u = torch.where(torch.isfinite(big), u, math.nan)
    return u.reshape(a.shape)


def _compute(x: Tensor, method: str, precision: str | None) -> Tensor:
    match method:
        case "svd":
            return _svd(x)
        case "qdwh":
            return _qdwh(x)
        case "zolo":
            return _zolo(x)
        case "newton_schulz":  # converges from singular values above about 1e-4 of the norm
            return newton_schulz(x, 22, coefficients=[(1.875, -1.25, 0.375)], form="standard",
                                 precision=precision)
        case "polar_express":
            return newton_schulz(x, 10, coefficients=_polar_express(10), form="standard", precision=precision)
    return _qdwh(x) if x.is_cuda else _auto(x)


def _polar_express(steps: int) -> list[tuple[float, float, float]]:
    """Converges to working precision from singular values of 1e-3 * 4.1^(8 - steps) of the norm. The second polynomial
    is all but the limit of the optimal ones for ever smaller singular values; it repeats. Of fewer than 8, the last."""
    table = resolve("polar_express", 8)
    return [table[0], *[table[1]] * (steps - 7), *table[2:]] if steps > 8 else list(table[-steps:])


def converging_steps(smallest: Tensor) -> Tensor:
    """How many of Polar Express' last polynomials take singular values from [smallest, 1] to 1, if that is not below
    1e-3: the interval that the k-th is made for begins at the product of the slopes before it times 1e-3."""
    slopes = torch.tensor([a for a, _, _ in resolve("polar_express", 8)[:4]], dtype=torch.float64,
                          device=smallest.device)
    return 8 - (smallest.double()[..., None] >= 1e-3 * slopes.cumprod(0)).sum(-1)


def _auto(x: Tensor) -> Tensor:
    """Polynomials, as many steps as most random matrices of this shape need, and five more for those that are not there
    yet; then an SVD of what has still not converged, or where U^T A came out less symmetric than it should."""
    m, n = x.shape[-2:]
    slow = x.dtype == torch.float64 or _level() in ("v2", "v3")  # products, beside an SVD's
    if x.numel() * n <= SMALL or (n > 512 and m < 2 * n and slow):
        return _svd(x)  # no slower there
    y = x / _size(x)
    table = tuple(_polar_express(_first_steps(m, n)))
    u = _as_stored(lambda t: polynomials(t, table), y)
    tolerance, steps = n * _TRACE[x.dtype], len(table)
    missing = _missing(u)
    # For small matrices an SVD costs as much as 20 steps and more: five may be risked, in vain if ill-conditioned.
    # Where no more than one singular value is missing, and that only in part, they are sure to do.
    while steps <= 16:
        more = (missing > tolerance) & (missing < (n if n <= 512 and steps <= 10 else 1))
        if not bool(more.any()):
            break
        late = _as_stored(lambda t: polynomials(t, resolve("polar_express", 8)[-5:]), u[more])
        u[more], missing[more] = late, _missing(late)
        steps += 5
    good = (missing.abs() <= tolerance) & _symmetric(u, x)
    if not bool(good.all()):
        u[~good] = _svd(x[~good])
    return u


def _size(x: Tensor) -> Tensor:
    """A bound of the spectral norm."""
    norm = nuclear_scale(_stored(x), _stored(x)).sqrt()
    if x.shape[-1] >= SPECTRAL:
        norm = torch.minimum(norm, spectral_norm(x))
    return norm[:, None, None].to(x.dtype)


def spectral_norm(x: Tensor) -> Tensor:
    """An estimate from below, made 15 % larger. Where it still is below, polynomials diverge, and that is seen."""
    rows = _signs(4, x)  # vectors lie in rows: thin products are many times faster so
    for _ in range(3):
        rows = (rows @ x.mT) @ x
        rows = rows / torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True)
    stretch = torch.linalg.vector_norm(rows @ x.mT, dim=-1) / torch.linalg.vector_norm(rows, dim=-1)
    return 1.15 * stretch.amax(-1)


def _first_steps(m: int, n: int) -> int:
    """How many steps a Gaussian matrix needs, nine times in ten, by its smallest singular value."""
    if m >= 2 * n:
        ratio = math.sqrt(n / m)
        smallest = 0.7 * (1 - ratio) / (1 + ratio)
    else:
        smallest = 0.1 / (2 * n)
    if n < SPECTRAL:
        smallest *= 2 / math.sqrt(n)
    if smallest < 1e-3:
        return 8 + math.ceil(math.log(1e-3 / smallest, 4.1))
    return int(converging_steps(torch.tensor(smallest, device="cpu")))


def _missing(u: Tensor) -> Tensor:
    """n - ||U||_F^2. Singular values come from below 1, so this shows how far the farthest one still is."""
    return u.shape[-1] - nuclear_scale(_stored(u), _stored(u)).double()


def _orthonormal(u: Tensor) -> Tensor:
    return _missing(u).abs() <= u.shape[-1] * _TRACE[u.dtype]


def _stored(x: Tensor) -> Tensor:
    """Whichever of x and x^T lies in memory row by row."""
    return x.mT if x.mT.is_contiguous() else x


def _as_stored(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) for a function that does the same to x^T: a wide matrix need not be copied to be seen as a tall one."""
    return f(x.mT).mT if x.mT.is_contiguous() else f(x)


def _symmetric(u: Tensor, x: Tensor) -> Tensor:
    """Estimates the skew part K of U^T X from P^T K Q with a few vectors, in a fraction of the time of H."""
    k = 8
    rows = _signs(2 * k, x)
    a, b = rows @ u.mT, rows @ x.mT
    skew = a[..., :k, :] @ b[..., k:, :].mT - b[..., :k, :] @ a[..., k:, :].mT
    # Rounding errors of large matrices may be larger: so are an SVD's.
    limit = _BACKWARD[x.dtype] * max(1.0, math.sqrt(x.shape[-1] / 1024))
    return torch.linalg.matrix_norm(skew) / (2 * k) <= limit * torch.linalg.matrix_norm(x)


def _signs(count: int, x: Tensor) -> Tensor:
    """Vectors of 1 and -1 in rows, for x on the CPU, the same on every call."""
    bits = torch.randint(2, (count, x.shape[-1]), generator=torch.Generator().manual_seed(0))
    return bits.to(x.dtype) * 2 - 1


def _noise(m: int, n: int, device: torch.device) -> Tensor:
    """Numbers in (-1, 1) without structure, in float64, the same on every call."""
    rows = torch.arange(1, m + 1, dtype=torch.float64, device=device)[:, None]
    columns = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    return torch.frac(1e4 * torch.sin(12.9898 * rows + 78.233 * columns))


def _svd(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def _polish(x: Tensor) -> Tensor:
    """One cubic Newton-Schulz step: squares the distance of singular values to 1."""
    gram = x.mT @ x
    gram.mul_(-0.5).diagonal(dim1=-2, dim2=-1).add_(1.5)
    return x @ gram


def _full_rank(x: Tensor) -> tuple[Tensor, float]:
    """x in float64 with norm at most 1 and full rank, and a lower bound of its smallest singular value.

    What is added is of the size of x's own rounding error, and the same for every item. Columns that depend on one
    another, or vanish, so get some orthonormal direction, as from an SVD.
    """
    _, m, n = x.shape
    eps = torch.finfo(x.dtype).eps
    y = x.double()
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    noise = _noise(m, n, x.device) / (math.sqrt(m) + math.sqrt(n))
    y = y / norm + eps * noise
    gram = y.mT @ y
    bound = torch.minimum(torch.linalg.matrix_norm(gram, keepdim=True), gram.abs().sum(-1, keepdim=True).amax(
        -2, keepdim=True))
    return y / bound.sqrt(), eps / (100 * n)


def _qdwh(x: Tensor) -> Tensor:
    """QDWH (Nakatsukasa, Bai, Gygi 2010): X <- X (a I + b X^T X) (I + c X^T X)^(-1).

    In place of QR steps for large c, c is bounded: a Cholesky step loses about eps * sqrt(c), so in float64 (also for
    float32 data) that stays below the result's accuracy, at the price of some more, much cheaper, steps.
    """
    y, low = _full_rank(x)
    limit = 1e3 if x.dtype == torch.float64 else 1e13
    for a, b, c in _halley_weights(low, limit):
        gram = y.mT @ y
        gram.mul_(c).diagonal(dim1=-2, dim2=-1).add_(1)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L)
        inverse.mul_(a - b / c).diagonal(dim1=-2, dim2=-1).add_(b / c)
        y = y @ inverse
    return _polish(_polish(y)).to(x.dtype)


def _halley_weights(low: float, limit: float) -> list[tuple[float, float, float]]:
    """Steps that take singular values from [low, 1] to within 1e-5 of 1; c never exceeds the limit."""
    floor = (4 / limit**3)**0.25 * 1.05  # c is close to (4 / l^4)^(1/3) for small l
    weights = []
    while low < 1 - 1e-5:
        square = max(low, floor)**2
        d = (4 * (1 / square - 1) / square)**(1 / 3)
        q = math.sqrt(1 + d)
        a = q + math.sqrt(2 - d + 2 * (2 - square) / (square * q))
        b = (a - 1)**2 / 4
        c = a + b - 1
        weights.append((a, b, c))
        low = min(1.0, low * (a + b * low * low) / (1 + c * low * low))
    return weights


def _zolo(x: Tensor) -> Tensor:
    """ZOLO-PD (Nakatsukasa, Freund 2016): the best rational approximation of the sign, of type (2r + 1, 2r)."""
    y, low = _full_rank(x)
    identity = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    while low < 1 - 1e-5:
        best = (_zolotarev(low, r) for r in range(1, 9))
        poles, weights, factor, reached = next(z for z in best if z[3] > 1 - 1e-5 or len(z[0]) == 8)
        total = y.clone()
        if poles[0] < 0.01:
            for c, a in zip(poles, weights, strict=True):
                q = torch.linalg.qr(torch.cat([y, (math.sqrt(c) * identity).expand(len(y), -1, -1)], -2)).Q
                total += a / math.sqrt(c) * (q[:, :y.shape[-2]] @ q[:, y.shape[-2]:].mT)
        else:
            gram = y.mT @ y
            total += y @ sum(a * torch.cholesky_inverse(torch.linalg.cholesky_ex(gram + c * identity).L)
                             for c, a in zip(poles, weights, strict=True))
        y = factor * total
        low = reached
    return _polish(_polish(y)).to(x.dtype)


def _zolotarev(low: float, r: int) -> tuple[list[float], list[float], float, float]:
    """c_{2j-1}, a_j and the factor M of f(x) = M x (1 + sum_j a_j / (x^2 + c_{2j-1})), f(1) = 1, and f(low)."""
    c = [(low * _sc(i / (2 * r + 1), low))**2 for i in range(1, 2 * r + 1)]
    odd, even = c[0::2], c[1::2]
    weights = []
    for j, pole in enumerate(odd):
        a = 1.0
        for k in range(r):
            a *= even[k] - pole
            if k != j:
                a /= odd[k] - pole
        weights.append(a)
    factor = math.prod((1 + o) / (1 + e) for o, e in zip(odd, even, strict=True))
    reached = factor * low * (1 + sum(a / (low * low + o) for o, a in zip(odd, weights, strict=True)))
    return odd, weights, factor, min(1.0, reached)


def _sc(t: float, k: float) -> float:
    """sn/cn at t K(k') for the modulus k' = sqrt(1 - k^2): -i sn(i t K(k'), k), by theta series in the nome of k,
    which converge fast however small k is."""
    big_k = math.pi / (2 * _agm(1.0, math.sqrt((1 - k) * (1 + k))))
    big_k_prime = math.pi / (2 * _agm(1.0, k))
    log_q = -math.pi * big_k_prime / big_k  # of the nome q
    z = -0.5 * t * log_q
    top = bottom = 0.0
    for n in range(12):
        # Exponents are joined before exp: cosh(2 n z) alone could overflow.
        power = n * (n + 1) * log_q
        top += (-1)**n * (math.exp(power + (2 * n + 1) * z) - math.exp(power - (2 * n + 1) * z))
        power = n * n * log_q
        bottom += (-1)**n * (math.exp(power + 2 * n * z) + math.exp(power - 2 * n * z)) * (0.5 if n == 0 else 1)
    return math.exp(0.25 * log_q) / math.sqrt(k) * top / bottom


def _agm(a: float, b: float) -> float:
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a
