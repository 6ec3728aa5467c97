"""The CUDA kernels of attention, on a GPU or emulated, against the formula in float64 and its derivatives by torch."""
import pytest
import torch
from torch.func import jvp, vjp

from gradops.curvature import reference

# Of what is stored as dtype, relative to the largest number: two roundings for float64 and float32 sums of up to a
# hundred products; P, S_dot and their like are rounded to 16 bits between products.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2.5e-2, torch.float16: 4e-3}


def name(o):
    return f"scaled_dot_product_attention{o}"


def make(dtype, device, batch, heads, key_heads, queries, keys, d, dv, seed=0):
    """q, k, v and their changes, the cotangent and its change."""
    torch.manual_seed(seed)
    sizes = [(*batch, heads, queries, d), (*batch, key_heads, keys, d), (*batch, key_heads, keys, dv)]
    sizes = [*sizes, *sizes, *[(*batch, heads, queries, dv)] * 2]
    return [torch.randn(s, dtype=torch.float64).to(dtype).to(device) for s in sizes]


def expected(x, x_dot, g, g_dot, mask, scale, causal):
    """(o, lse), their changes, the gradients and theirs, in float64."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()

    def f(q, k, v):
        o = reference.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)
        # The same scores weigh a value of ones.
        s = q @ k.repeat_interleave(q.shape[-3] // k.shape[-3], -3).mT * scale
        see = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril() if causal else mask
        if see is not None:
            s = s.masked_fill(~see, -torch.inf) if see.dtype == torch.bool else s + see
        return o, s.logsumexp(-1)

    def gradient(q, k, v, g):
        return vjp(lambda *x: f(*x)[0], q, k, v)[1](g)

    x, x_dot = ([t.double() for t in ts] for ts in (x, x_dot))
    out, out_dot = jvp(f, tuple(x), tuple(x_dot))
    gradients, changes = jvp(gradient, (*x, g.double()), (*x_dot, g_dot.double()))
    return out, out_dot, gradients, changes


def close(actual, wanted, tolerance):
    for a, w in zip(actual, wanted, strict=True):
        assert a.shape == w.shape and a.is_contiguous()
        finite = w.isfinite()
        assert torch.equal(a.double()[~finite], w[~finite]), (a, w)
        scale = max(1.0, float(w[finite].abs().max())) if finite.any() else 1.0
        worst = float((a.double() - w)[finite].abs().max()) if finite.any() else 0.0
        assert worst <= tolerance * scale, (worst, scale, tolerance)


def check(backend, dtype, sizes, mask=None, causal=False, given=(True,) * 4, tolerance=None, prepare=None):
    device, ops = backend
    *x, q_dot, k_dot, v_dot, g, g_dot = make(dtype, device, *sizes)
    if prepare:
        x = [prepare(t) for t in x]
        g = prepare(g)
    mask = None if mask is None else mask.to(device)
    dots = [t if there else None for t, there in zip((q_dot, k_dot, v_dot, g_dot), given, strict=True)]
    zeros = [t if there else torch.zeros_like(t) for t, there in zip((q_dot, k_dot, v_dot, g_dot), given, strict=True)]
    scale = 1.2 * sizes[-2] ** -0.5
    out, out_dot, gradients, changes = expected(x, zeros[:3], g, zeros[3], mask, scale, causal)
    call = lambda op, *args: getattr(ops, name(op))(*x, mask, scale, causal, *args)
    tolerance = tolerance or TOLERANCE[dtype]
    saved = call("")
    close(saved, out, tolerance)
    both = call("_dual", *dots[:3])
    close(both[:2], out, tolerance)
    close(both[2:], [out_dot[0], out_dot[1].nan_to_num(0)], tolerance)
    moved = call("_jvp", *saved, *dots[:3])
    close(moved, [out_dot[0], out_dot[1].nan_to_num(0)], tolerance)
    close(call("_backward", *saved, g, 7), gradients, tolerance)
    second = (*saved, g, *dots[:3], *both[2:], dots[3])
    close(call("_backward_jvp", *second, 7), changes, 2 * tolerance)
    all_six = call("_backward_dual", *second, 7)
    close(all_six[:3], gradients, tolerance)
    close(all_six[3:], changes, 2 * tolerance)


def random_mask(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def seen(queries, keys):
    """A mask for all heads, by which queries 1 and 2 see nothing."""
    mask = random_mask(queries, keys)
    mask[1:3] = False
    return mask.expand(2, queries, keys)


def added(dtype, heads, queries, keys):
    """Numbers, with a step between keys that is not 1."""
    torch.manual_seed(1)
    mask = torch.randn(keys, queries, heads).to(dtype).permute(2, 1, 0)
    return mask.masked_fill(random_mask(heads, queries, keys), -torch.inf).index_fill_(1, torch.tensor([3]), -torch.inf)


def heads_inside(t):
    """The same numbers, stored as (rows, heads, columns + 1)."""
    wide = torch.nn.functional.pad(t.transpose(-3, -2), (0, 1)).contiguous()
    return wide[..., :-1].transpose(-3, -2)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Tiles that are not full, heads in groups, more columns than one warp has, more tiles than one.
CASES = {
    "float64": (F64, ((2,), 4, 2, 19, 21, 5, 35), {}),
    "float64 causal": (F64, ((), 2, 1, 70, 37, 3, 4), {"causal": True}),
    "float64 mask": (F64, ((), 2, 2, 9, 11, 6, 2), {"mask": seen(9, 11), "prepare": heads_inside}),
    "float32": (F32, ((1, 2), 3, 3, 35, 70, 9, 6), {"causal": True}),
    "float32 wide": (F32, ((), 1, 1, 5, 20, 70, 130), {}),
    "float32 mask": (F32, ((), 2, 1, 17, 18, 8, 4), {"mask": added(F32, 2, 17, 18)}),
    "bfloat16": (BF16, ((), 2, 1, 70, 75, 20, 36), {"prepare": heads_inside}),
    "bfloat16 causal": (BF16, ((), 2, 2, 70, 130, 16, 16), {"causal": True}),
    "bfloat16 wide": (BF16, ((), 1, 1, 17, 40, 256, 200), {}),
    "bfloat16 mask": (BF16, ((), 2, 1, 17, 20, 8, 16), {"mask": added(BF16, 2, 17, 20)}),
    "float16": (F16, ((), 2, 1, 33, 34, 72, 24), {"causal": True}),
    "float16 mask": (F16, ((), 2, 2, 34, 9, 16, 8), {"mask": seen(34, 9)}),
}


@pytest.mark.parametrize("case", CASES)
def test_matches(cuda_backend, case):
    dtype, sizes, options = CASES[case]
    check(cuda_backend, dtype, sizes, **options)


@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize("given", [(0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)])
def test_some_changes(cuda_backend, dtype, given):
    check(cuda_backend, dtype, ((), 2, 1, 5, 6, 8, 3), given=given)


def all_results(backend, tensors, mask=None, causal=False):
    _, ops = backend
    *x, q_dot, k_dot, v_dot, g, g_dot = tensors
    call = lambda op, *args: getattr(ops, name(op))(*x, mask, 0.5, causal, *args)
    o, lse = call("")
    dual = call("_dual", q_dot, k_dot, v_dot)
    six = call("_backward_dual", o, lse, g, q_dot, k_dot, v_dot, *dual[2:], g_dot, 7)
    return [o, lse, *dual, *call("_backward", o, lse, g, 7), *six]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_batch_is_loop_and_nan_stays(cuda_backend, dtype):
    tensors = make(dtype, cuda_backend[0], (3,), 2, 2, 7, 9, 8, 8)
    whole = all_results(cuda_backend, tensors)
    for a, b in zip(all_results(cuda_backend, [t[1:2] for t in tensors]), whole, strict=True):
        assert torch.equal(a[0], b[1])
    tensors[1][0, 1, 2, 3] = torch.nan  # one key of one head
    for a, b in zip(all_results(cuda_backend, tensors), whole, strict=True):
        assert torch.equal(a[1:], b[1:]) and torch.equal(a[0, 0], b[0, 0]) and a[0, 1].isnan().any()


def test_nothing_there(cuda_backend):
    for queries, keys in [(0, 3), (3, 0), (0, 0)]:
        for dtype in (F32, BF16):
            o, lse, *rest = all_results(cuda_backend, make(dtype, cuda_backend[0], (2,), 2, 1, queries, keys, 8, 2))
            assert not o.any() and (lse == -torch.inf).all() and not any(t.any() for t in rest[2:])
    assert not any(t.numel() for t in all_results(cuda_backend, make(BF16, cuda_backend[0], (0,), 2, 1, 3, 3, 4, 2)))


def test_gradients_that_are_not_wanted(cuda_backend):
    device, ops = cuda_backend
    *x, q_dot, k_dot, v_dot, g, g_dot = make(BF16, device, (), 2, 1, 5, 6, 8, 3)
    o, lse, o_dot, mu = getattr(ops, name("_dual"))(*x, None, 0.5, False, q_dot, k_dot, v_dot)
    second = (*x, None, 0.5, False, o, lse, g, q_dot, k_dot, v_dot, o_dot, mu, g_dot)
    every = getattr(ops, name("_backward_dual"))(*second, 7)
    for wanted in (1, 2, 4):
        six = getattr(ops, name("_backward_dual"))(*second, wanted)
        for i, (a, b) in enumerate(zip(six, every, strict=True)):
            assert torch.equal(a, b) if wanted >> i % 3 & 1 else a.shape[-1] == 0


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_little_shared_memory(cuda_backend, dtype, monkeypatch):
    """Smaller tiles on small GPUs: the same bits."""
    if cuda_backend[1] is torch.ops.gradops:
        pytest.skip("a GPU has what it has")
    tensors = make(dtype, "cpu", (), 1, 1, 17, 20, 256, 256)
    plenty = all_results(cuda_backend, tensors)
    monkeypatch.setenv("GRADOPS_EMU_SHARED", "101376")
    assert all(map(torch.equal, all_results(cuda_backend, tensors), plenty))
    monkeypatch.setenv("GRADOPS_EMU_SHARED", "20000")
    with pytest.raises(Exception, match="too little shared memory"):
        all_results(cuda_backend, tensors)
