import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.linalg import gram, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(g, want, x, rounding):
    """Rounding of products and sums, relative to the norms of the two rows."""
    norms = x.double().norm(dim=-1)
    assert ((g.double() - want).abs() <= rounding * norms[..., :, None] * norms[..., None, :]).all()


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 33), (70, 45), (2, 3, 17, 700), (3, 0, 4), (3, 4, 0), (0, 2, 3)])
def test_matches_float64(backend, shape, dtype, wide):
    device, ops = backend
    if dtype == torch.float64 and not wide:
        return
    x = randn(*shape).to(device, dtype)
    before = x.clone()
    g = ops.gram([x], wide)
    assert g.dtype == (torch.float64 if wide else torch.float32) and torch.equal(x, before)
    assert torch.equal(g, g.mT)
    # A sum of n products in the worst order: n roundings. Products of narrower numbers are exact in float64.
    close(g, reference.gram(x), x, (2.0**-53 if wide else 2.0**-24) * (shape[-1] + 1))


@pytest.mark.parametrize("dtype, wide", [(torch.float32, True), (torch.float32, False), (torch.float64, True)])
@pytest.mark.parametrize("shape", [(300, 2100), (1, 4200), (12, 9000), (520, 300), (257, 5)])
def test_groups_of_rows_and_slices_of_columns(shape, dtype, wide):
    x = randn(*shape).to(dtype)
    g = gram(x, accumulate=torch.float64 if wide else torch.float32)
    assert torch.equal(g, g.mT)
    # Chunks of 256 products are summed apart.
    close(g, reference.gram(x), x, (2.0**-53 if wide else 2.0**-24) * (256 + shape[-1] / 256))


def test_many_tiles_on_cuda(cuda_backend):
    device, ops = cuda_backend
    x = randn(130, 1100).float().to(device)  # 3 x 3 tiles, 3 slices
    g = ops.gram([x], True)
    assert torch.equal(g, g.mT)
    close(g, reference.gram(x), x, 2.0**-53 * 1100)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), cols=st.integers(0, 300), batch=st.lists(st.integers(0, 3), max_size=2),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_shape(rows, cols, batch, dtype, seed):
    x = randn(*batch, rows, cols, seed=seed).to(dtype)
    close(gram(x), reference.gram(x), x, 2.0**-53 * (cols + 1))


def test_blocks():
    x = randn(3, 20, 500).float()
    for parts in (x.split([100, 0, 399, 1], -1), list(x.split(64, -1))):
        close(gram(parts), reference.gram(x), x, 2.0**-53 * 500)


@pytest.mark.parametrize("wide", [True, False])
def test_blocks_in_one_call(backend, wide):
    device, ops = backend
    x = randn(2, 66, 700).to(device, torch.bfloat16)
    parts = [x[..., :100].half(), x[..., 100:100], x[..., 100:640].float(), *x[..., 640:].split(2, -1)]  # 33 of them
    if wide:
        parts[2] = parts[2].double()
    g = ops.gram(parts, wide)
    assert torch.equal(g, g.mT) and all(torch.equal(g[i], ops.gram([p[i] for p in parts], wide)) for i in range(2))
    close(g, reference.gram(x.double()), x, (2.0**-53 if wide else 2.0**-24) * 700)
    with pytest.raises(RuntimeError, match="agree in all but their columns"):
        ops.gram([x, x[:, :65]], wide)


def test_batch_item_equals_single(backend):
    device, ops = backend
    x = randn(3, 20, 1200).float().to(device)
    g = ops.gram([x], True)
    assert all(torch.equal(g[i], ops.gram([x[i]], True)) for i in range(3))


def test_nan_and_inf_stay_in_their_rows(backend):
    device, ops = backend
    x = randn(2, 20, 100).float().to(device)
    want = ops.gram([x], True)
    x[0, 3, 99], x[0, 19, 0] = torch.nan, torch.inf
    g = ops.gram([x], True)
    keep = torch.ones(20, dtype=torch.bool)
    keep[3] = keep[19] = False
    assert torch.equal(g[1], want[1]) and torch.equal(g[0][keep][:, keep], want[0][keep][:, keep])
    assert g[0, 3].isnan().all() and not g[0, 19].isfinite().any()


def test_strided_input(backend):
    device, ops = backend
    x = randn(40, 64).float().to(device)
    for view in (x[::2], x[:, ::2], x.t(), x[:1].expand(5, 64)):
        assert torch.equal(ops.gram([view], True), ops.gram([view.clone()], True))


def test_small_singular_values_survive():
    """Down to 1e-7 of the largest, of float32 numbers; float32 sums lose those below about 1e-3."""
    q = torch.linalg.qr(randn(30, 30)).Q
    v = torch.linalg.qr(randn(2000, 30, seed=1)).Q
    x = ((q * torch.logspace(0, -7, 30, dtype=torch.float64)) @ v.T).float()
    exact = torch.linalg.svdvals(x.double())

    def error(g):
        return ((torch.linalg.eigvalsh(g.double()).flip(-1).clamp_min(0).sqrt() - exact) / exact).abs()

    assert error(gram(x))[exact > 1e-6].max() < 1e-3
    assert error(gram(x, accumulate=torch.float32))[-1] > 0.5


def test_derivatives_of_a_list():
    parts = tuple(randn(3, n, seed=n).requires_grad_() for n in (4, 1, 2))
    assert torch.autograd.gradcheck(lambda *j: gram(j), parts, check_forward_ad=True)
    x = randn(3, 4).bfloat16().requires_grad_()
    grad, = torch.autograd.grad(gram(x).sum(), x)
    want, = torch.autograd.grad(reference.gram(x).sum(), x)
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("level", [pytest.param("v2", marks=pytest.mark.slow), "v3"])
def test_other_levels(level, run_at_level):
    run_at_level(level, "(cpu and test_matches) or test_groups", __file__,
                 pathlib.Path(__file__).with_name("test_jt_apply.py"))


def test_bad_input():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"J\[1\] must be a torch.Tensor, got int"):
        gram([x, 1])
    with pytest.raises(TypeError, match="J must be float64"):
        gram(x.long())
    for bad, match in [(torch.ones(3), "J must have at least 2 dimensions"), ([], "J must hold at least one block"),
                       ([x, torch.ones(3, 3)], r"J\[1\] must have the shape of J\[0\]")]:
        with pytest.raises(ValueError, match=match):
            gram(bad)
    with pytest.raises(ValueError, match="accumulate must be None"):
        gram(x, accumulate=torch.bfloat16)
    with pytest.raises(ValueError, match=r"accumulate must be torch.float64 for a float64 J"):
        gram([x, x.double()], accumulate=torch.float32)
