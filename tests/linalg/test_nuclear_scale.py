import pytest
import torch

from gradops.linalg import nuclear_scale, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 33), (2, 300, 170), (2, 2, 5, 4), (0, 5), (3, 0, 4), (0, 2, 2)])
def test_matches_float64(backend, shape, dtype):
    device, ops = backend
    m, u = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    torch.testing.assert_close(ops.nuclear_scale(m, u), reference.nuclear_scale(m.double(), u.double()),
                               rtol=1e-12, atol=1e-11)


def test_result_dtype():
    for dtype in DTYPES:
        x = torch.ones(2, 2, dtype=dtype)
        y = nuclear_scale(x, x)
        assert y == 4 and y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_gradient_at_the_polar_factor_is_the_polar_factor():
    a = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    w, _, v = torch.linalg.svd(a.detach(), full_matrices=False)
    grad, = torch.autograd.grad(nuclear_scale(a, w @ v), a)
    torch.testing.assert_close(grad, w @ v)


def test_nan_stays_in_its_item_and_batch_item_equals_single(backend):
    device, ops = backend
    m, u = torch.randn(2, 3, 200, 300, device=device)
    m[1, 2, 3] = torch.nan
    y = ops.nuclear_scale(m, u)
    assert y[1].isnan() and not y[[0, 2]].isnan().any()
    assert all(torch.equal(y[i], ops.nuclear_scale(m[i], u[i])) for i in (0, 2))


def test_strided_input(backend):
    device, ops = backend
    m, u = torch.randn(2, 30, 40, device=device)
    assert torch.equal(ops.nuclear_scale(m.t(), u[:, :40].t()), ops.nuclear_scale(m.t().clone(), u.t().clone()))


def test_bad_input():
    x = torch.ones(2, 3)
    for call, error, match in [
        (lambda: nuclear_scale(x, x.T), ValueError, r"U must have the shape of M, \(2, 3\), got \(3, 2\)"),
        (lambda: nuclear_scale(x, x.double()), TypeError, "U must have the dtype of M"),
        (lambda: nuclear_scale(x, x.to("meta")), ValueError, "U must be on the device of M"),
        (lambda: nuclear_scale(x.int(), x), TypeError, "M must be"),
        (lambda: nuclear_scale(x, 3.0), TypeError, "U must be a torch.Tensor, got float"),
        (lambda: nuclear_scale(x[0], x[0]), ValueError, "M must have at least 2 dimensions"),
    ]:
        with pytest.raises(error, match=match):
            call()
