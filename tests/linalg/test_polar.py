import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from gradops.linalg import polar, polar_methods, reference

ACCURATE = ["auto", "svd", "qdwh", "zolo"]
# Orthogonality per row, and backward error: about what LAPACK's SVD gives.
TOLERANCE = {torch.float64: (1e-13, 1e-13), torch.float32: (1e-6, 3e-6)}


@pytest.fixture(autouse=True, scope="module")
def polynomials_for_small_ones_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polar_methods, "SMALL", 0)
        yield


def gaussian(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_singular_values(shape, s, seed=0):
    k = min(shape[-2:])
    left = torch.linalg.qr(gaussian(*shape[:-1], k, seed=seed)).Q
    right = torch.linalg.qr(gaussian(*shape[:-2], shape[-1], k, seed=seed + 1)).Q
    return (left * s) @ right.mT


def check(a, u, h, side="right"):
    orthogonal, backward = TOLERANCE[a.dtype]
    a, u, h = a.double(), u.double(), h.double()
    tall = u if u.shape[-2] >= u.shape[-1] else u.mT
    eye = torch.eye(tall.shape[-1], dtype=torch.float64)
    assert torch.linalg.matrix_norm(tall.mT @ tall - eye, 2).amax() <= orthogonal * max(2, tall.shape[-2])
    product = u @ h if side == "right" else h @ u
    norm = torch.linalg.matrix_norm(a)
    assert (torch.linalg.matrix_norm(product - a) <= backward * norm).all()
    assert torch.equal(h, h.mT)
    assert (torch.linalg.eigvalsh(h)[..., 0] >= -backward * norm).all()


@pytest.mark.parametrize("method", ACCURATE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 40, 15), (24, 24), (2, 15, 40), (1, 5)])
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e12, math.inf])
def test_any_conditioning(shape, condition, dtype, method):
    k = min(shape[-2:])
    graded = torch.logspace(0, -math.log10(min(condition, 1e12)), k, dtype=torch.float64)
    one_small = torch.ones(k, dtype=torch.float64)
    one_small[-1] = 1 / condition
    if condition == math.inf:
        graded[k // 2:] = 0
    for s in (graded, one_small):
        a = with_singular_values(shape, s).to(dtype)
        for side in ("right", "left"):
            check(a, *polar(a, side=side, method=method), side)


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 60, 20), (40, 40), (2, 20, 60)])
def test_products_converge_up_to_moderate_conditioning(shape, dtype, method):
    a = with_singular_values(shape, torch.logspace(0, -2, min(shape[-2:]), dtype=torch.float64)).to(dtype)
    check(a, *polar(a, method=method, precision="highest"))


@pytest.mark.parametrize("shape", [(64, 32, 32), (8, 64, 64), (2, 256, 256), (2, 128, 1024), (600, 600)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_auto_on_gaussian_matrices(shape, dtype):
    a = gaussian(*shape, dtype=dtype)
    before = a.clone()
    u, h = polar(a)
    check(a, u, h)
    assert torch.equal(a, before) and u.dtype == h.dtype == dtype
    assert torch.equal(polar(a, compute_h=False)[0], u) and polar(a, compute_h=False)[1] is None


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 7), min_size=2, max_size=4), seed=st.integers(0, 99),
       side=st.sampled_from(["right", "left"]), method=st.sampled_from(ACCURATE),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_any_shape(shape, seed, side, method, dtype):
    a = gaussian(*shape, dtype=dtype, seed=seed)
    u, h = polar(a.mT.contiguous().mT, side=side, method=method)
    n = shape[-1] if side == "right" else shape[-2]
    assert u.shape == a.shape and h.shape == (*shape[:-2], n, n) and u.dtype == h.dtype == dtype
    if a.numel() and dtype in TOLERANCE:
        check(a, u, h, side)
    elif a.numel():
        product = u.double() @ h.double() if side == "right" else h.double() @ u.double()
        assert (product - a.double()).norm() <= 2e-2 * a.double().norm()


@pytest.mark.parametrize("method", ACCURATE)
def test_matches_reference(method):
    a = gaussian(3, 9, 5)
    for side in ("right", "left"):
        for got, want in zip(polar(a, side=side, method=method), reference.polar(a, side=side), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", [*ACCURATE, "polar_express", "newton_schulz"])
@pytest.mark.parametrize("dtype, power", [(torch.float64, 660), (torch.float32, 98), (torch.bfloat16, 98)])
def test_scale_does_not_matter(method, dtype, power):
    a = gaussian(2, 9, 5, dtype=dtype)
    u = polar(a, method=method, compute_h=False)[0]
    for scale in (2.0**power, 2.0**-power):
        assert torch.equal(polar(a * scale, method=method, compute_h=False)[0], u)


@pytest.mark.parametrize("method", ACCURATE)
def test_zero_and_nonfinite_items(method):
    a = gaussian(4, 6, 4)
    a[0], a[1, 2, 3], a[2, 0, 0] = 0, math.nan, math.inf
    u, h = polar(a, method=method)
    torch.testing.assert_close(u[0], torch.eye(6, 4, dtype=a.dtype))
    assert (h[0] == 0).all() and u[1:3].isnan().all() and h[1:3].isnan().all()
    check(a[3], u[3], h[3])


def test_precision_setting_does_not_reach_accurate_methods():
    a = gaussian(3, 40, 40, dtype=torch.float32)
    try:
        torch.set_float32_matmul_precision("medium")
        for method in ACCURATE:
            check(a, *polar(a, method=method))
        b = a.clone().requires_grad_()
        polar(b)[1].square().sum().backward()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(b.grad, 2 * a, rtol=1e-4, atol=1e-4)  # ||H|| = ||A||


@pytest.mark.parametrize("low", [1e-20, 1e-8, 0.1, 0.9])
def test_zolotarev_equioscillates(low):
    odd, weights, factor, reached = polar_methods._zolotarev(low, 4)
    x = torch.logspace(math.log10(low), 0, 20001, dtype=torch.float64)
    f = factor * x * (1 + sum(a / (x * x + c) for c, a in zip(odd, weights, strict=True)))
    assert abs(f.max() - 1) < 1e-12 and f.min() >= reached * (1 - 1e-6)
    inner = f[1:-1]
    extrema = ((inner > f[:-2]) == (inner > f[2:])).sum()
    assert low > 0.5 or extrema == 8  # 2 r between the ends


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 5), (2, 3, 2)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_derivatives(shape, side):
    a = gaussian(*shape).requires_grad_()
    for f in (lambda a: polar(a, side=side), lambda a: polar(a, compute_h=False)[0]):
        assert gradcheck(f, (a,), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, (a,), check_fwd_over_rev=True)


def test_derivatives_where_singular_values_coincide():
    for a in (torch.eye(4, dtype=torch.float64), 2 * torch.linalg.qr(gaussian(6, 3)).Q):
        a.requires_grad_()
        assert gradcheck(polar, (a,), check_forward_ad=True) and gradgradcheck(polar, (a,))


def test_gradient_of_the_nuclear_norm_is_u():
    a = gaussian(2, 7, 5).requires_grad_()
    u, _ = polar(a)
    grad, = torch.autograd.grad((a * u).sum(), a)
    torch.testing.assert_close(grad, u.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 2])
def test_rank_deficient_derivative_raises(rank):
    a = (gaussian(6, rank) @ gaussian(rank, 4)).requires_grad_()
    with pytest.raises(RuntimeError, match="A has no full rank"):
        polar(a)[0].sum().backward()
    with pytest.raises(RuntimeError, match="A has no full rank"):
        torch.func.jvp(lambda x: polar(x)[0], (a.detach(),), (torch.ones_like(a),))


def test_transforms():
    a = gaussian(3, 5, 4)
    loss = lambda x: polar(x)[1].sin().sum() + polar(x, compute_h=False)[0].cos().sum()
    want = torch.func.grad(loss)(a)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(a), want)
    torch.testing.assert_close(torch.func.vmap(polar, in_dims=2)(a.movedim(0, 2))[0], polar(a)[0])
    tangent = gaussian(3, 5, 4, seed=7)
    torch.testing.assert_close(torch.func.jvp(loss, (a,), (tangent,))[1], (want * tangent).sum())


def test_compile_and_export():
    class Model(torch.nn.Module):
        def forward(self, x):
            return polar(x)

    a = gaussian(3, 5, 4)
    torch.testing.assert_close(torch.compile(lambda x: polar(x), fullgraph=True, backend="aot_eager")(a), polar(a))
    torch.testing.assert_close(torch.export.export(Model(), (a,)).module()(a), polar(a))
    b = a.clone().requires_grad_()
    step = torch.compile(lambda x: polar(x)[1].sin().sum(), fullgraph=True, backend="aot_eager")
    got, = torch.autograd.grad(step(b), b)
    want, = torch.autograd.grad(polar(b)[1].sin().sum(), b)
    torch.testing.assert_close(got, want)


def test_opcheck():
    args = (gaussian(3, 5, 4), "right", "auto", True, "highest")
    torch.library.opcheck(torch.ops.gradops.polar, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("a, options, error, words", [
    ([[1.0]], {}, TypeError, "A must be a torch.Tensor"),
    (torch.ones(3), {}, ValueError, "A must have at least 2 dimensions"),
    (torch.ones(3, 3, dtype=torch.int64), {}, TypeError, "A must be float64"),
    (torch.ones(3, 3, dtype=torch.complex64), {}, TypeError, "A must be float64"),
    (torch.ones(3, 3).to_sparse(), {}, TypeError, "A must be a dense tensor"),
    (torch.ones(3, 3), {"side": "up"}, ValueError, "side must be one of 'right', 'left', got 'up'"),
    (torch.ones(3, 3), {"method": "qr"}, ValueError, "method must be one of .*, got 'qr'"),
    (torch.ones(3, 3), {"precision": "low"}, ValueError, "precision must be one of .*, got 'low'"),
])
def test_bad_input(a, options, error, words):
    with pytest.raises(error, match=words):
        polar(a, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_auto_needs_no_svd_for_what_is_usual(dtype, monkeypatch):
    def refuse(x):
        raise AssertionError(f"an SVD of {tuple(x.shape)}")

    monkeypatch.setattr(polar_methods, "_svd", refuse)
    for shape in [(64, 32, 32), (8, 128, 128), (2, 64, 256), (2, 300, 128)]:
        polar(gaussian(*shape, dtype=dtype))
    # beyond what the first steps are made for: five more are spent on this one alone
    a = gaussian(4, 40, 40)
    a[2] = with_singular_values((40, 40), torch.logspace(0, -5, 40, dtype=torch.float64))
    check(a.to(dtype), *polar(a.to(dtype)))


@pytest.mark.parametrize("shape", [(130, 130), (140, 300)])
def test_auto_whatever_the_estimate_of_the_norm(shape, monkeypatch):
    """An estimate far too small makes the polynomials diverge: that is seen, and an SVD taken."""
    a = gaussian(*shape)
    monkeypatch.setattr(polar_methods, "spectral_norm", lambda x: 0.1 * torch.linalg.matrix_norm(x, 2))
    check(a, *polar(a))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_few_small_matrices_go_to_lapack(dtype):
    a = gaussian(3, 20, 12, dtype=dtype)
    by_polynomials = polar(a)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polar_methods, "SMALL", 100_000)
        patch.setattr(polar_methods, "polynomials", None)
        u, h = polar(a)
    check(a, u, h)
    torch.testing.assert_close(u, by_polynomials[0], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
