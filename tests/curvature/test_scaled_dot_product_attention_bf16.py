"""Products of bf16, where the processor has them: forward and backward without changes. Elsewhere these run on the
kernels that widen bf16, to the same tolerances."""
import pytest
import torch

from gradops.curvature import reference

ops = torch.ops.gradops
# Of a norm. P and dS are rounded to bf16 before their products, the results again, and D is made of the rounded o.
EPS = 2 * torch.finfo(torch.bfloat16).eps
SCALE = 0.3
# batch, heads, key heads, queries, keys, d, dv
SHAPES = [(2, 2, 1, 33, 70, 40, 24), (1, 4, 2, 64, 32, 8, 80), (1, 1, 1, 300, 290, 16, 8), (1, 2, 1, 5, 65, 256, 9)]


@pytest.mark.parametrize("level", ["v4_bf16", "amx_twin"])
def test_level(level, run_at_level):
    run_at_level(level, "not level", __file__)


def tensors(batch, heads, key_heads, queries, keys, d, dv):
    """q, k, v, g: heads next to rows, as linear layers give them, with NaN in between."""

    def make(heads, rows, columns):
        x = torch.full((batch, rows + 1, heads, columns + 3), torch.nan, dtype=torch.bfloat16)
        x[:, :rows, :, :columns] = torch.randn(batch, rows, heads, columns)
        return x[:, :rows, :, :columns].transpose(1, 2)

    torch.manual_seed(0)
    return make(heads, queries, d), make(key_heads, keys, d), make(key_heads, keys, dv), make(heads, queries, dv)


def exact(q, k, v, g, mask, causal):
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    numbers = mask.double() if mask is not None and mask.dtype == torch.bfloat16 else mask
    o = reference.scaled_dot_product_attention(q, k, v, numbers, is_causal=causal, scale=SCALE, enable_gqa=True)
    s = SCALE * q.detach() @ k.detach().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + numbers
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return o.detach(), s.logsumexp(-1), torch.autograd.grad(o, (q, k, v), g.double())


def run(q, k, v, g, mask=None, causal=False, wanted=7):
    o, lse = ops.scaled_dot_product_attention(q, k, v, mask, SCALE, causal)
    return o, lse, ops.scaled_dot_product_attention_backward(q, k, v, mask, SCALE, causal, o, lse, g, wanted)


def masks(batch, heads, queries, keys):
    hidden = torch.rand(batch, heads, queries, keys) < 0.5
    hidden[..., ::7, :] = True
    yield ~hidden
    yield ~hidden[:, :1, 1:2].expand(hidden.shape)
    yield torch.randn(keys, queries).bfloat16().mT.expand(hidden.shape)
    yield torch.randn(batch, heads, queries, keys).bfloat16().masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, one_thread):
    x = tensors(*shape)
    cases = [(None, False), (None, True), *((m, False) for m in masks(*shape[:2], *shape[3:5]))]
    for mask, causal in cases:
        o, lse, gradients = run(*x, mask, causal=causal)
        want_o, want_lse, want = exact(*x, mask, causal)
        unseen = want_lse == -torch.inf
        assert (lse[unseen] == -torch.inf).all() and not o[unseen].any() and not gradients[0][unseen].any()
        torch.testing.assert_close(lse[~unseen].double(), want_lse[~unseen], rtol=1e-6, atol=3e-6)  # float32
        for a, b in zip((o, *gradients), (want_o, *want), strict=True):
            assert a.dtype == torch.bfloat16 and (a.double() - b).norm() <= EPS * b.norm()


def test_wanted(one_thread):
    x = tensors(1, 2, 1, 40, 70, 16, 24)
    whole = run(*x)[2]
    for wanted in range(1, 7):
        for i, (part, of) in enumerate(zip(run(*x, wanted=wanted)[2], whole, strict=True)):
            assert torch.equal(part, of) if wanted >> i & 1 else part.shape[-1] == 0


def test_bits_of_any_batch_and_threads():
    """Keys of 17 heads are a unit each, those of one are two."""
    x, threads = tensors(17, 2, 1, 70, 290, 8, 8), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            o, lse, gradients = run(*x)
            alone = run(*(y[4:5] for y in x))
            results.append((o, lse, *gradients))
            for a, b in zip((alone[0], alone[1], *alone[2]), results[-1], strict=True):
                assert torch.equal(a, b[4:5])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_nan_stays_in_its_head(one_thread):
    x = tensors(2, 3, 3, 40, 40, 16, 16)
    clean = run(*x)
    for t in x:
        ruined = [y.clone() for y in x]
        ruined[[t is y for y in x].index(True)][1, 1, 7, 3] = torch.nan
        for a, b in zip((lambda r: (*r[:2], *r[2]))(run(*ruined)), (*clean[:2], *clean[2]), strict=True):
            bad = torch.zeros(2, 3, dtype=torch.bool)
            bad[1, 1] = True
            assert torch.equal(a[~bad], b[~bad])


def test_nothing_to_see(one_thread):
    for queries, keys in ((3, 0), (0, 3)):
        o, lse, gradients = run(*tensors(2, 2, 1, queries, keys, 8, 8))
        assert o.shape == (2, 2, queries, 8) and not o.any() and (lse == -torch.inf).all()
        assert not any(x.any() for x in gradients)


def test_scores_as_large_as_1e12(one_thread):
    """The largest score of a query has all its weight, and no rounding makes a power of two infinite."""
    q, k, v, g = tensors(1, 2, 2, 40, 70, 64, 16)
    o, lse, gradients = run(q * 1e6, k * 1e5, v, g)
    first = (q.double() @ k.double().mT).argmax(-1)
    assert torch.equal(o, v.gather(2, first[..., None].expand(o.shape)))
    assert all(x.isfinite().all() for x in (lse, *gradients))
