"""scaled_dot_product_attention: its six passes on every backend, and the function with its derivatives."""
import pathlib
from functools import partial

import pytest
import torch
from torch.func import jvp, vjp
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from gradops.curvature import reference, scaled_dot_product_attention

from .second_order import check_second_order

# Rounding of numbers and of the scores' exponents: of the norm of a result, in units of what is expected of it.
ERROR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def numbers(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def example(batch, heads, key_heads, queries, keys, d, dv, dtype=torch.float64):
    """q, k, v and g, and changes of the four."""
    shapes = [(heads, queries, d), (key_heads, keys, d), (key_heads, keys, dv), (heads, queries, dv)] * 2
    return [numbers(i, *batch, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def passes(ops, x, mask, scale, causal, wanted=7):
    """The results of all six: o, lse, o_dot, mu, three gradients, and their changes; the last ten once more."""
    *x, g, q_dot, k_dot, v_dot, g_dot = x
    base, dots = (*x, mask, scale, causal), (q_dot, k_dot, v_dot)
    o, lse = ops.scaled_dot_product_attention(*base)
    o_dot, mu = ops.scaled_dot_product_attention_jvp(*base, o, lse, *dots)
    changes = (*base, o, lse, g, *dots, o_dot, mu, g_dot, wanted)
    return [o, lse, o_dot, mu, *ops.scaled_dot_product_attention_backward(*base, o, lse, g, wanted),
            *ops.scaled_dot_product_attention_backward_jvp(*changes),
            *ops.scaled_dot_product_attention_dual(*base, *dots),
            *ops.scaled_dot_product_attention_backward_dual(*changes)]


def expected(x, mask, scale, causal):
    x = [t.double() for t in x]
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    f = partial(reference.scaled_dot_product_attention, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=True)
    o, o_dot = jvp(f, tuple(x[:3]), tuple(x[4:7]))
    grads, grads_dot = jvp(lambda *x: vjp(f, *x[:3])[1](x[3]), tuple(x[:4]), tuple(x[4:]))
    return o, o_dot, grads, grads_dot


def check(ops, x, mask=None, causal=False, scale=0.3):
    dtype, tolerance = x[0].dtype, ERROR[x[0].dtype]
    got = passes(ops, x, mask, scale, causal)
    o, o_dot, grads, grads_dot = expected(x, mask, scale, causal)
    want = [o, None, o_dot, None, *grads, *grads_dot]
    for y, exact in zip(got, want + [o, None, o_dot, None, *grads, *grads_dot], strict=True):
        if exact is None:
            assert y.dtype == (dtype if dtype == torch.float64 else torch.float32) and y.shape == o.shape[:-1]
        else:
            assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous()
            assert (y.double() - exact).norm() <= tolerance * exact.norm()
    return got


def some_mask(kind, heads, queries, keys, dtype, device="cpu"):
    """Hides a third, and all keys of the second query."""
    hidden = numbers(9, heads, queries, keys, dtype=torch.float32).to(device) > 0.5
    hidden[:, 1] = True
    if kind == "bool":
        return ~hidden
    return torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("mask, causal", [(None, False), (None, True), ("bool", False), ("float", False)])
def test_small(backend, dtype, mask, causal):
    device, ops = backend
    x = [t.to(device) for t in example((2,), 2, 1, 5, 7, 6, 3, dtype)]
    m = None if mask is None else some_mask(mask, 2, 5, 7, dtype, device).expand(2, 2, 5, 7)
    check(ops, x, m, causal)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [((), 2, 2, 150, 200, 32, 48), ((1,), 4, 2, 270, 170, 40, 24),
                                   ((2,), 1, 1, 70, 3, 5, 17)])
def test_cpu_level(shape, causal, dtype):
    check(torch.ops.gradops, example(*shape, dtype=dtype), causal=causal)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_cpu_level_of_masks(kind):
    mask = some_mask(kind, 2, 150, 140, torch.float32)
    mask[:, 70:] = mask[:, :1]  # whole tiles hidden
    x = example((3,), 2, 1, 150, 140, 16, 16, torch.float32)
    want = check(torch.ops.gradops, x, mask.expand(3, -1, -1, -1))
    for same in (mask.mT.contiguous().mT.expand(3, -1, -1, -1), mask.repeat(3, 1, 1, 2)[..., :140]):
        got = passes(torch.ops.gradops, x, same, 0.3, False)
        assert all(map(torch.equal, got, want))
    check(torch.ops.gradops, x, mask[:, :, :1].expand(3, -1, -1, 140))
    check(torch.ops.gradops, x, mask[:1, 5:6].expand(3, 2, 150, -1))


@pytest.mark.parametrize("level", [pytest.param("v2", marks=pytest.mark.slow), "v3"])
def test_other_levels(run_at_level, level):
    run_at_level(level, "cpu_level and (shape1 or bool)", pathlib.Path(__file__))


def test_second_order():
    x = [numbers(i, 2, 3, 4) for i in range(3)]
    call = partial(scaled_dot_product_attention, is_causal=True)
    check_second_order(call, partial(reference.scaled_dot_product_attention, is_causal=True), x)


def test_second_order_of_groups_and_masks():
    x = [numbers(0, 2, 2, 3), numbers(1, 1, 3, 3), numbers(2, 1, 3, 2)]
    mask = numbers(3, 2, 1, 3)
    mask[0, 0, 1] = -torch.inf
    given = {"attn_mask": mask, "scale": 0.7, "enable_gqa": True}
    check_second_order(partial(scaled_dot_product_attention, **given),
                       partial(reference.scaled_dot_product_attention, **given), x)


@pytest.mark.parametrize("shapes", [
    [(5, 4), (7, 4), (7, 3)], [(2, 5, 4), (7, 4), (7, 3)], [(3, 1, 2, 5, 4), (2, 1, 7, 4), (1, 2, 7, 3)],
    [(0, 2, 5, 4), (0, 2, 7, 4), (0, 2, 7, 3)], [(2, 0, 4), (2, 7, 4), (2, 7, 3)], [(2, 5, 4), (2, 0, 4), (2, 0, 3)],
    [(2, 5, 4), (2, 7, 4), (2, 7, 0)], [(2, 5, 0), (2, 7, 0), (2, 7, 3)],
])  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_dimensions_broadcast_and_may_be_empty(shapes, causal):
    x = [numbers(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]
    scale = 0.5
    y = scaled_dot_product_attention(*x, is_causal=causal, scale=scale)
    want = reference.scaled_dot_product_attention(*x, is_causal=causal, scale=scale)
    torch.testing.assert_close(y, want)
    g = numbers(5, *y.shape)
    torch.testing.assert_close(torch.autograd.grad(y, x, g, allow_unused=True),
                               torch.autograd.grad(want, x, g, allow_unused=True))


def test_like_torch():
    q, k, v = (numbers(i, 2, 4, 6, 8) for i in range(3))
    mask = some_mask("bool", 4, 6, 6, torch.float64)
    for given in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 2.0}, {"attn_mask": mask[:1, :1].double()}):
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **given), torch_attention(q, k, v, **given))
    given = {"enable_gqa": True}
    torch.testing.assert_close(scaled_dot_product_attention(q, k[:, :2], v[:, :2], **given),
                               torch_attention(q, k[:, :2], v[:, :2], **given))


def test_strides_are_read_in_place():
    want = passes(torch.ops.gradops, example((3,), 2, 2, 40, 50, 16, 16, torch.float32), None, 0.3, True)
    x = example((3,), 2, 2, 40, 50, 16, 16, torch.float32)
    for view in (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: t.mT.contiguous().mT,
                 lambda t: t.repeat(1, 1, 2, 1)[:, :, :t.shape[2]], lambda t: t.repeat(1, 1, 1, 2)[..., :16]):
        assert all(map(torch.equal, passes(torch.ops.gradops, [view(t) for t in x], None, 0.3, True), want))


@pytest.mark.parametrize("causal", [False, True])
def test_threads_and_batches_do_not_change_a_bit(causal):
    x = example((2,), 4, 2, 200, 300, 24, 32, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(passes(torch.ops.gradops, x, None, 0.3, causal))
    finally:
        torch.set_num_threads(before)
    single = [passes(torch.ops.gradops, [t[i] for t in x], None, 0.3, causal) for i in range(2)]
    results.append([torch.stack(pair) for pair in zip(*single, strict=True)])
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_nan_and_infinity_stay_in_their_head_and_row(backend):
    device, ops = backend
    x = [t.to(device) for t in example((), 3, 3, 5, 6, 4, 4, torch.float32)]
    want = passes(ops, x, None, 0.3, False)
    x[0][0, 2, 1], x[1][1, 3, 2] = torch.nan, torch.inf
    got = passes(ops, x, None, 0.3, False)
    for y, before in zip(got, want, strict=True):
        assert torch.equal(y[2], before[2])
    assert got[0][0, 2].isnan().all() and got[0][1].isnan().any()
    keep = [0, 1, 3, 4]
    assert torch.equal(got[0][0, keep], want[0][0, keep]) and torch.equal(got[2][0, keep], want[2][0, keep])


def test_a_query_that_sees_no_key(backend):
    device, ops = backend
    x = [t.to(device) for t in example((), 1, 1, 4, 3, 4, 4, torch.float32)]
    mask = torch.ones(1, 4, 3, dtype=torch.bool, device=device)
    mask[0, 2] = False
    o, lse, o_dot, mu, dq, *_, dq_dot, _, _ = passes(ops, x, mask, 0.5, False)
    assert lse[0, 2] == -torch.inf
    for y in (o, o_dot, mu, dq, dq_dot):
        assert (y[0, 2] == 0).all() and not y.isnan().any()


def test_large_scores():
    """Exponents are of differences: nothing overflows, and rounding of the scores is all that is seen."""
    x = example((), 2, 2, 80, 90, 32, 32, torch.float32)
    x[0] *= 300
    got, (o, *_) = passes(torch.ops.gradops, x, None, 0.3, True), expected(x, None, 0.3, True)
    assert (got[0].double() - o).norm() <= 1e-3 * o.norm() and all(t.isfinite().all() for t in got)


def test_what_is_not_wanted_is_not_computed():
    x = example((2,), 2, 1, 20, 30, 8, 8)
    everything = passes(torch.ops.gradops, x, None, 0.3, True)
    for wanted in range(8):
        got = passes(torch.ops.gradops, x, None, 0.3, True, wanted)
        for first in (4, 7, 14, 17):
            for i in range(3):
                if wanted >> i & 1:
                    torch.testing.assert_close(got[first + i], everything[first + i], rtol=0, atol=0)
                else:
                    assert got[first + i].shape == (*everything[first + i].shape[:-1], 0)


def test_bf16_is_as_accurate_as_torch():
    x = example((1,), 2, 2, 200, 200, 64, 64, torch.bfloat16)
    exact = expected(x, None, 0.125, True)

    def errors(f):
        o, o_dot = jvp(f, tuple(x[:3]), tuple(x[4:7]))
        grads, grads_dot = jvp(lambda *x: vjp(f, *x[:3])[1](x[3]), tuple(x[:4]), tuple(x[4:]))
        got, want = [o, o_dot, *grads, *grads_dot], [*exact[:2], *exact[2], *exact[3]]
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]

    given = {"scale": 0.125, "is_causal": True}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = errors(partial(torch_attention, **given))
    ours = errors(partial(scaled_dot_product_attention, **given))
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_bad_input():
    q, k, v = numbers(0, 2, 3, 4), numbers(1, 2, 5, 4), numbers(2, 2, 5, 6)
    call = scaled_dot_product_attention
    with pytest.raises(TypeError, match=r"query must be a torch.Tensor, got list"):
        call([1.0], k, v)
    with pytest.raises(TypeError, match=r"key must have the dtype of query, torch.float64, got torch.float32"):
        call(q, k.float(), v)
    with pytest.raises(TypeError, match="value must be float64, float32, bfloat16 or float16"):
        call(q, k, v.long())
    with pytest.raises(ValueError, match="query must have at least 2 dimensions"):
        call(q[0, 0], k, v)
    with pytest.raises(ValueError, match="key must have the 4 columns of query"):
        call(q, v, v)
    with pytest.raises(ValueError, match="value must have the 5 rows of key"):
        call(q, k, v[:, :3])
    with pytest.raises(ValueError, match="query, key and value must have dimensions in front"):
        call(q, k[:1].repeat(3, 1, 1), v)
    with pytest.raises(ValueError, match="query must have a multiple of the heads of key and value, got 2, 3 and 2"):
        call(q, k[:1].repeat(3, 1, 1), v, enable_gqa=True)
    with pytest.raises(ValueError, match=r"dropout_p must be 0, there is no dropout here; got 0.1"):
        call(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match="attn_mask must be None with is_causal=True"):
        call(q, k, v, torch.ones(3, 5, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to \(2, 3, 5\)"):
        call(q, k, v, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="attn_mask must be bool, float32 or of query's dtype"):
        call(q, k, v, torch.ones(3, 5, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="attn_mask asks for a derivative"):
        call(q, k, v, torch.ones(3, 5, requires_grad=True))
    with pytest.raises(RuntimeError, match="attn_mask asks for a derivative"):
        jvp(lambda m: call(q, k, v, m), (torch.ones(3, 5),), (torch.ones(3, 5),))
