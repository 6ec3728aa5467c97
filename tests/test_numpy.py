import numpy as np
import pytest
import torch

from gradops import linalg

arrays = pytest.importorskip("gradops.numpy")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("shape", [(3, 20, 33), (40, 7), (0, 3, 4), (1, 1)])
def test_same_as_torch(shape, dtype):
    x, y = np.random.default_rng(0).standard_normal((2, *shape)).astype(dtype)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    same = {"rtol": 1e-6, "atol": 1e-6 if dtype != np.float16 else 1e-3}
    np.testing.assert_allclose(arrays.row_norm(x, center=True), linalg.row_norm(tx, center=True).numpy(), **same)
    np.testing.assert_allclose(arrays.nuclear_scale(x, y), linalg.nuclear_scale(tx, ty).numpy(), **same)
    want = linalg.newton_schulz(tx, 6, precision="highest").numpy()
    np.testing.assert_allclose(arrays.newton_schulz(x, 6), want, **same)


def test_strided_and_threads():
    x = np.random.default_rng(0).standard_normal((200, 300))
    want = arrays.newton_schulz(np.ascontiguousarray(x[::2].T))
    for n in (1, 2, 3):
        arrays.set_num_threads(n)
        assert np.array_equal(arrays.newton_schulz(x[::2].T), want)


def test_bad_input():
    for call, error, match in [
        (lambda: arrays.row_norm(np.ones(3)), ValueError, "x must have at least 2 dimensions"),
        (lambda: arrays.row_norm(np.ones((2, 2), int)), TypeError, "x must be float64"),
        (lambda: arrays.newton_schulz(np.ones((2, 2)), coefficients="aol"), ValueError, "coefficients='aol'"),
        (lambda: arrays.nuclear_scale(np.ones((2, 2)), np.ones((2, 3))), ValueError, "U must have the shape"),
        (lambda: arrays.gram([np.ones((2, 3))] * 2), TypeError, "J must be one array, got a list"),
        (lambda: arrays.gram(np.ones((2, 3)), accumulate=np.float32), ValueError, "accumulate must be np.float64"),
        (lambda: arrays.spectral_solve(np.ones((2, 3)), np.ones(2)), ValueError, "G must be square"),
        (lambda: arrays.pinv_apply(np.ones((2, 3)), np.ones(3)), ValueError, "r must have the shape of J"),
        (lambda: arrays.pinv_apply(np.ones((2, 3)), np.ones(2), rtol=1.0), ValueError, "rtol must be in"),
        (lambda: arrays.set_num_threads(0), ValueError, "n must be positive"),
    ]:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("shape", [(2, 12, 300), (30, 7), (0, 3, 4), (4, 0), (0, 4)])
def test_gram_and_what_is_solved_through_it(shape, dtype):
    rng = np.random.default_rng(0)
    J, r = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape[:-1])
    tj, tr = torch.from_numpy(J), torch.from_numpy(r)
    G = arrays.gram(J)
    np.testing.assert_array_equal(G, linalg.gram(tj).numpy())
    if dtype != np.float64:
        np.testing.assert_array_equal(arrays.gram(J, accumulate=np.float32),
                                      linalg.gram(tj, accumulate=torch.float32).numpy())
    for options in ({"k": 3}, {"filter": "smooth", "power": 0.5}, {"filter": "tikhonov", "damping": 0.1}):
        for a, b in zip(arrays.spectral_solve(G, r, **options),
                        linalg.spectral_solve(torch.from_numpy(G), tr, **options), strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-6, atol=1e-6)  # directions of next to no weight
    for rtol in (1e-2, 1e-8):  # through the Gram matrix and through QR
        ours = arrays.pinv_apply(J, r, rtol=rtol)
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, linalg.pinv_apply(tj, tr, rtol=rtol).numpy(),
                                   rtol=1e-6 if dtype != np.float16 else 2e-3, atol=1e-6)


def test_a_bad_item_stays_alone():
    J, r = np.random.default_rng(0).standard_normal((3, 4, 20)), np.ones((3, 4))
    J[1, 2, 3] = np.nan
    for rtol in (1e-2, 1e-8):
        y = arrays.pinv_apply(J, r, rtol=rtol)
        assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()
    rank = arrays.spectral_solve(arrays.gram(J), r)[2]
    assert rank.tolist() == [4, -1, 4]
