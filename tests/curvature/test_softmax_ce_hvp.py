import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp

from gradops.curvature import cross_entropy, reference, softmax_ce_hvp

from .test_cross_entropy import DTYPES, TOLERANCE, error, numbers, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 70)])
def test_raw_op(backend, dtype, shape):
    device, ops = backend
    z, u = numbers(shape, dtype, scale=3).to(device), numbers(shape, dtype, 1).to(device)
    scale = numbers(shape[:-1], seed=2).to(device)
    scale.view(-1)[1] = 0
    want = reference.softmax_ce_hvp(z.double(), u.double(), reduction="sum") * scale[..., None]
    ours = ops.softmax_ce_hvp(z, u, scale)
    assert error(ours, want) <= TOLERANCE[dtype]
    for out in (torch.empty_like(z), u.clone(), z.clone()):
        ops.softmax_ce_hvp_out(z, u, scale, out)
        assert torch.equal(out, ours)
    over_u, over_z = u.clone(), z.clone()
    ops.softmax_ce_hvp_out(z, over_u, scale, over_u)
    ops.softmax_ce_hvp_out(over_z, u, scale, over_z)
    assert torch.equal(over_u, ours) and torch.equal(over_z, ours)


@given(dtype=st.sampled_from(DTYPES), rows=st.integers(0, 5), classes=st.integers(1, 5000),
       reduction=st.sampled_from(["mean", "sum"]), some=st.booleans())
@settings(deadline=None, max_examples=20)
def test_matches_float64(dtype, rows, classes, reduction, some):
    z, u = numbers((rows, classes), dtype, scale=4), numbers((rows, classes), dtype, 1)
    t = targets((rows,), classes) if some else None
    want = reference.softmax_ce_hvp(z.double(), u.double(), t, reduction=reduction)
    ours = softmax_ce_hvp(z, u, t, reduction=reduction)
    assert ours.dtype == dtype
    # numbers below float16's range become 0; where p is nearly 1, u - p.u has the reference's own rounding errors
    least = 1e-5 if dtype == torch.float16 else 1e-15 * u.double().norm()
    assert (ours.double() - want).norm() <= TOLERANCE[dtype] * want.norm() + least


def test_is_the_hessian_of_cross_entropy_and_symmetric():
    z, u, v, t = numbers((4, 300)), numbers((4, 300), seed=1), numbers((4, 300), seed=2), torch.tensor([1, -100, 3, 3])
    want = jvp(grad(lambda z: cross_entropy(z, t, label_smoothing=0.1)), (z,), (u,))[1]
    torch.testing.assert_close(softmax_ce_hvp(z, u, t, label_smoothing=0.1), want, atol=1e-16, rtol=1e-12)
    uh, hv = softmax_ce_hvp(z.float(), u.float()).double(), softmax_ce_hvp(z.float(), v.float()).double()
    assert abs((uh * v).sum() - (hv * u).sum()) <= 1e-6 * u.norm() * v.norm()


def test_a_large_constant_in_u_drops_out():
    """H maps constants to 0: u - p.u is taken before the product with p."""
    z, u = numbers((3, 2100), torch.float32, scale=3), numbers((3, 2100), torch.float32, 1) + 1000
    want = reference.softmax_ce_hvp(z.double(), u.double())
    assert error(softmax_ce_hvp(z, u), want) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_digits_are_lost_where_p_is_nearly_one(backend, dtype):
    """There p.u is nearly one number of u, and their difference is what counts."""
    device, ops = backend
    z, u = numbers((3, 400), dtype).to(device), numbers((3, 400), dtype, 1).to(device)
    for row, place in enumerate((0, 77, 399)):
        z[row, place] = 16
    want = reference.softmax_ce_hvp(z.double(), u.double(), reduction="sum")
    assert error(ops.softmax_ce_hvp(z, u, torch.ones(3).double().to(device)), want) <= TOLERANCE[dtype]


def test_out_and_strides():
    z, u, t = numbers((40, 6), torch.float32).T, numbers((40, 6), torch.float32, 1).T, targets((6,), 40)
    want = softmax_ce_hvp(z.contiguous(), u.contiguous(), t)
    assert torch.equal(softmax_ce_hvp(z, u, t), want)
    out = torch.empty_like(z)
    assert softmax_ce_hvp(z, u, t, out=out) is out and not out.is_contiguous() and torch.equal(out, want)
    v = u.contiguous()
    assert softmax_ce_hvp(z, v, t.int(), out=v) is v and torch.equal(v, want)
    rows = torch.stack([softmax_ce_hvp(z[i], u[i], reduction="sum") for i in range(6)])
    assert torch.equal(softmax_ce_hvp(z, u, reduction="sum"), rows)
    assert (softmax_ce_hvp(z, u, torch.full((6,), -100)) == 0).all()


@pytest.mark.parametrize("change, kind, message", [
    ({"logits": torch.zeros(3, 0)}, ValueError, "logits must have at least 1 class"),
    ({"u": torch.zeros(3, 5)}, ValueError, r"u must have the shape of logits, \(3, 4\), got \(3, 5\)"),
    ({"u": torch.zeros(3, 4).double()}, TypeError, "u must have the dtype of logits, torch.float32, got torch.float64"),
    ({"u": None}, TypeError, "u must be a torch.Tensor"),
    ({"out": torch.zeros(3, 5)}, ValueError, "out must have the shape of logits"),
    ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, r"target must have shape \(3,\)"),
    ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
])
def test_what_is_wrong_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        softmax_ce_hvp(**{"logits": torch.zeros(3, 4), "u": torch.zeros(3, 4)} | change)
