import pytest
import torch

from gradops.linalg.wide_matmul import wide_matmul_

BITS16 = [torch.bfloat16, torch.float16]


def matrix(rows, cols, dtype, transposed=False, seed=0):
    x = torch.randn((cols, rows) if transposed else (rows, cols), generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).mT if transposed else x.to(dtype)


def check(out, left, right, add=False):
    """Against float64, for what bfloat16 makes of a float32 operand."""
    before = out.double()
    wide_matmul_(out, left, right, add=add)
    rounded = left.to(right.dtype).double() if right.dtype == torch.bfloat16 else left.double()
    products = [x @ right.double() for x in (rounded, left.double())]
    errors = [(out.double() - (x + (before if add else 0))).abs() for x in products]
    # sums of k products in float32; older processors do not round the left operand
    scale = left.double().abs() @ right.double().abs() + before.abs()
    allowed = 1e-6 * scale + 1e-30
    if out.dtype == right.dtype:
        allowed = allowed + torch.finfo(out.dtype).eps * torch.maximum(products[0].abs(), products[1].abs())
    assert ((errors[0] <= allowed) | (errors[1] <= allowed)).all()


@pytest.mark.parametrize("dtype", BITS16)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 31, 65), (300, 290, 40), (2, 3, 2100), (64, 0, 5)])
def test_matches_float64(shape, dtype):
    m, n, k = shape
    for transposed in ((False, True), (True, False), (True, True)):
        right = matrix(k, n, dtype, transposed[1], seed=1)
        for left_dtype, out_dtype in ((dtype, torch.float32), (torch.float32, torch.float32), (torch.float32, dtype)):
            left = matrix(m, k, left_dtype, transposed[0])
            check(matrix(m, n, out_dtype, seed=2), left, right)
            if out_dtype == torch.float32:
                check(matrix(m, n, out_dtype, seed=2), left, right, add=True)


@pytest.mark.parametrize("dtype", [*BITS16, torch.float32])
def test_strides_and_nothing_to_add_up(dtype):
    left, right = matrix(9, 40, dtype)[::2, 3:20], matrix(34, 60, dtype, seed=1)[::2, ::3]
    out = torch.full((5, 30), 7.0)
    check(out[:, 4:24], left, right)
    assert (out[:, :4] == 7).all() and (out[:, 24:] == 7).all()  # only its own place is written
    check(torch.zeros(5, 20), left[:1].expand(5, 17), right)
    out = torch.ones(3, 4)
    wide_matmul_(out, matrix(3, 0, dtype), matrix(0, 4, dtype), add=True)
    assert (out == 1).all()
    wide_matmul_(out, matrix(3, 0, dtype), matrix(0, 4, dtype))
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", BITS16)
def test_nan_stays_in_its_row_and_threads_change_no_bit(dtype):
    left, right, before = matrix(600, 70, dtype), matrix(70, 600, dtype, seed=1), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.empty(600, 600))
            wide_matmul_(results[-1], left, right)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results[1:])
    left[7, 3] = torch.nan
    wide_matmul_(results[1], left, right)
    assert results[1][7].isnan().all()
    results[1][7] = results[0][7]
    assert torch.equal(*results[:2])


def test_bad_input():
    op = torch.ops.gradops.wide_matmul_
    out, left, right = torch.zeros(3, 4), matrix(3, 5, torch.bfloat16), matrix(5, 4, torch.bfloat16)
    for args, match in (((out, left, right.float()), "right must be bfloat16 or float16"),
                        ((out, left.half(), right), "left must be float32 or have the dtype of right"),
                        ((out.double(), left, right), "out must be float32"),
                        ((out.half(), left, right), "out must be float32"),
                        ((out, left[:, 1:], right), "shapes of out, left and right"),
                        ((out[:2], left, right), "shapes of out, left and right"),
                        ((out, left[0], right), "left must have 2 dimensions"),
                        ((torch.zeros(4, 3).mT, left, right), "rows of out must be contiguous")):
        with pytest.raises(RuntimeError, match=match):
            op(*args, False)
    with pytest.raises(RuntimeError, match="out must be float32"):
        op(out.bfloat16(), left, right, True)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["v2", "v3", "v4", "amx_twin"])
def test_other_levels(level, run_at_level):
    run_at_level(level, "not other_levels", __file__)
