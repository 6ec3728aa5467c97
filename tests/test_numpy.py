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
        (lambda: arrays.set_num_threads(0), ValueError, "n must be positive"),
    ]:
        with pytest.raises(error, match=match):
            call()
