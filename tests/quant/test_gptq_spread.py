"""The product that compensation is made of, against float64."""
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.quant.gptq_spread import gptq_spread_

op = torch.ops.gradops.gptq_spread_


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(dtype, depth):
    return torch.finfo(dtype).eps * (2 * depth + 10)  # a sum of `depth` products of about 1


@pytest.mark.slow
@pytest.mark.parametrize("level", ["v2", "v3"])
def test_level(level, run_at_level):
    """What depends on the level, here and for upper_factor."""
    run_at_level(level, "deep or inverse", __file__, pathlib.Path(__file__).with_name("test_upper_factor.py"))


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 150), st.integers(0, 70)),
       dtype=st.sampled_from([torch.float32, torch.float64]), add=st.booleans(),
       right=st.sampled_from(["rows", "columns", "neither"]), wide=st.booleans(), fresh=st.booleans(),
       with_base=st.booleans())
def test_any_shape_and_stride(shape, dtype, add, right, wide, fresh, with_base):
    batch, rows, cols, depth = shape
    whole = numbers(batch, rows, cols + 9, dtype=dtype)
    e = numbers(batch, rows, depth * (2 if wide else 1), dtype=dtype, seed=1)[..., :: 2 if wide else 1]
    u = numbers(batch, depth + 3, cols + 5, dtype=dtype, seed=2)[:, 3:, 5:]
    base = numbers(batch, rows, cols + 2, dtype=dtype, seed=3)[..., 2:] if with_base else None
    want = whole.double()
    if fresh:
        whole[..., 9:] = torch.nan
        want[..., 9:] = 0
    if with_base:
        want[..., 9:] += base
    want[..., 9:] += (1 if add else -1) * e.double() @ u.double()
    if right == "columns":
        u = u.mT.contiguous().mT
    elif right == "neither":
        u = torch.stack([u, u], -1)[..., 0]
    op(whole[..., 9:], e, u, add, fresh, base)
    torch.testing.assert_close(whole.double(), want, rtol=0, atol=bound(dtype, depth))


@pytest.mark.parametrize("shape", [(1, 13, 37, 513), (2, 25, 300, 1100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deep_products(shape, dtype):
    batch, rows, cols, depth = shape
    w, e = numbers(batch, rows, cols, dtype=dtype), numbers(batch, rows, depth, dtype=dtype, seed=1)
    u = numbers(batch, cols, depth, dtype=dtype, seed=2).mT
    want = w.double() - e.double() @ u.double()
    out = torch.full_like(w, torch.nan)
    op(out, e, u, False, True, w)
    op(w, e, u, False)
    for x in (w, out):
        torch.testing.assert_close(x.double(), want, rtol=0, atol=bound(dtype, depth) * 4)  # the largest of many


def test_rows_items_and_threads_change_no_bit():
    w, e, u = numbers(3, 47, 140), numbers(3, 47, 700, seed=1), numbers(3, 700, 140, seed=2)
    want = w.clone()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = w.clone()
            op(out, e, u, False)
            want = out if count == 1 else want
            assert torch.equal(out, want)
    finally:
        torch.set_num_threads(threads)
    for item, rows in ((1, slice(0, 1)), (2, slice(5, 40))):
        out = w[item : item + 1, rows].clone()
        op(out, e[item : item + 1, rows], u[item : item + 1], False)
        assert torch.equal(out, want[item : item + 1, rows])


def test_nan_stays_in_its_row():
    w, e, u = numbers(2, 30, 40), numbers(2, 30, 20, seed=1), numbers(2, 20, 40, seed=2)
    e[1, 7, 3] = torch.nan
    op(w, e, u, False)
    bad = torch.zeros(2, 30, dtype=torch.bool)
    bad[1, 7] = True
    assert torch.equal(w.isnan().all(-1), bad) and torch.equal(w.isnan().any(-1), bad)


def test_the_function_is_the_op():
    w, e, u = numbers(1, 3, 4), numbers(1, 3, 5, seed=1), numbers(1, 5, 4, seed=2)
    other = w.clone()
    gptq_spread_(w, e, u)
    op(other, e, u, False)
    assert torch.equal(w, other)
    gptq_spread_(w, e, u, fresh=True, base=other)
    op(other, e, u, False)
    torch.testing.assert_close(w, other)


def test_bad_input_is_refused():
    one = torch.ones(1, 2, 3)
    for message, arguments in {
        "shapes do not fit": (one, torch.ones(1, 2, 4), torch.ones(1, 3, 3)),
        "must have 3 dimensions": (one[0], one, one),
        "must all be float32 or all": (one.double(), one, one),
        "side by side": (one.mT, torch.ones(1, 3, 4), torch.ones(1, 4, 2)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, False)
