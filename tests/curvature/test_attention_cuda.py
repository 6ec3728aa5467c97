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
    call = lambda op, *args: getattr(ops, name(op))(*x, mask, scale, causal, *args)  # noqa: E731
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


CASES = {
    # Tiles that are not full, heads in groups, more columns than one warp has, more tiles than one.
    "float64": (torch.float64, ((2,), 4, 2, 19, 21, 5, 35), {}),
    "float64 causal": (torch.float64, ((), 2, 1, 70, 37, 3, 4), dict(causal=True)),
    "float32": (torch.float32, ((1, 2), 3, 3, 35, 70, 9, 6), dict(causal=True)),
    "float32 wide": (torch.float32, ((), 1, 1, 5, 20, 70, 130), {}),
    "bfloat16": (torch.bfloat16, ((2,), 2, 1, 70, 75, 20, 36), {}),
    "bfloat16 causal": (torch.bfloat16, ((), 2, 2, 70, 130, 16, 16), dict(causal=True)),
    "bfloat16 wide": (torch.bfloat16, ((), 1, 1, 17, 40, 256, 200), {}),
    "float16": (torch.float16, ((), 2, 1, 33, 34, 72, 24), dict(causal=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_matches(cuda_backend, case):
    dtype, sizes, options = CASES[case]
    check(cuda_backend, dtype, sizes, **options)
