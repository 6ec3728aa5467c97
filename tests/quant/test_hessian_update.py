
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.quant import gptaq_cross_update_, hessian_update_, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of |d| / sqrt(H_ii H_jj): sums of at most 1024 products in float32. "high" drops the product of the low parts.
SINGLE, SPLIT = 1e-6, 2e-5


def gauss(*shape, dtype=torch.float32, seed=0):
    """Features of uneven size, as in activations."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * torch.randn(shape[-1], generator=g).exp()).to(dtype)


def start(batch, n, dtype=torch.float32):
    """Symmetric H of some tokens before."""
    x = gauss(batch, n, n + 3, dtype=torch.float64, seed=5)
    h = x @ x.mT
    return ((h + h.mT) / 2).to(dtype)


def error(h, want, scale=None):
    d = (want if scale is None else scale).diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).sqrt()
    return ((h.double() - want).abs() / (d[..., :, None] * d[..., None, :])).max().item()


def run(ops, h, x, n_seen, mask=None, x_q=None, split=False):
    """Raw ops take (items, tokens, n)."""
    n_seen = torch.full(h.shape[:1], n_seen, dtype=torch.int64, device=h.device)
    if x_q is None:
        return ops.hessian_update_(h, x, n_seen, mask, split)
    return ops.gptaq_cross_update_(h, x, x_q, n_seen, mask, split)


@pytest.mark.parametrize("level", ["v4_bf16", pytest.param("amx_twin", marks=pytest.mark.slow)])
def test_level(level, run_at_level):
    run_at_level(level, "cpu and (matches or masked) or long or threads", __file__)


SHAPES = [(1, 1), (7, 3), (33, 65), (70, 129), (40, 200)]


def shapes(ops):  # the emulator is slow, and the last shape has nothing new for the CUDA kernel
    return SHAPES[:-1] if ops is torch.ops.gradops_emu else SHAPES


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("double", [False, True], ids=["h32", "h64"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_matches_float64(backend, dtype, double, split):
    device, ops = backend
    if dtype == torch.float64 and not double:
        pytest.skip("refused")
    limit = SPLIT if split and dtype != torch.bfloat16 else SINGLE
    limit = 1e-13 if dtype == torch.float64 else limit
    for tokens, n in shapes(ops):
        x = gauss(2, tokens, n, dtype=dtype).to(device)
        before = x.clone()
        h = start(2, n, dtype=torch.float64 if double else torch.float32).to(device)
        want = h.double().clone()
        reference.hessian_update_(want, x, 10)
        n_new = run(ops, h, x, 10, split=split)
        assert n_new.tolist() == [10 + tokens] * 2 and torch.equal(x, before)
        assert torch.equal(h, h.mT) and error(h, want) <= limit


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_cross_matches_float64(backend, dtype, split):
    device, ops = backend
    for tokens, n in shapes(ops):
        x_q = gauss(2, tokens, n, dtype=dtype).to(device)
        x = (x_q.double() + 0.01 * gauss(2, tokens, n, dtype=torch.float64, seed=2).to(device)).to(dtype)
        d = start(2, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(device) * 0.01
        want = d.double().clone()
        scale = want.abs() + 2 / (10 + tokens) * ((x.double() - x_q.double()).abs().mT @ x_q.double().abs())
        reference.gptaq_cross_update_(want, x, x_q, 10)
        assert run(ops, d, x, 10, x_q=x_q, split=split).tolist() == [10 + tokens] * 2
        limit = 1e-14 if dtype == torch.float64 else SPLIT if split else SINGLE
        assert ((d.double() - want).abs() <= limit * scale).all()


@pytest.mark.parametrize("dtype, double", [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)])
def test_long_matches_float64(dtype, double):
    """More than one chunk of tokens, more than one square of features, more than one group of panels."""
    x = gauss(1, 2100, 530, dtype=dtype)
    x_q = x.flip(1)
    for split in (False, True):
        h = torch.zeros(1, 530, 530, dtype=torch.float64 if double else torch.float32)
        want = h.double().clone()
        reference.hessian_update_(want, x, 0)
        run(torch.ops.gradops, h, x, 0, split=split)
        assert torch.equal(h, h.mT) and error(h, want) <= (SPLIT if split else SINGLE)
        d, want_d = torch.zeros_like(h), torch.zeros_like(want)
        reference.gptaq_cross_update_(want_d, x, x_q, 0)
        run(torch.ops.gradops, d, x, 0, x_q=x_q, split=split)
        assert error(d, want_d, want) <= 3 * (SPLIT if split else SINGLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens_do_not_count(backend, dtype):
    device, ops = backend
    x = gauss(3, 90, 40, dtype=dtype).to(device)
    mask = torch.rand(3, 90, generator=torch.Generator().manual_seed(0)).to(device) < 0.4
    mask[1] = False
    x_q = gauss(3, 90, 40, dtype=dtype, seed=4).to(device)
    for other in (None, x_q):
        ruined = x.where(mask[..., None], torch.nan)
        h = start(3, 40).to(device)
        alone = [h[i:i + 1].clone() for i in range(3)]
        n_new = run(ops, h, ruined, 7, mask, other)
        assert n_new.tolist() == (7 + mask.sum(-1)).tolist()
        for i in range(3):
            rest = None if other is None else other[i:i + 1, mask[i]]
            run(ops, alone[i], x[i:i + 1, mask[i]], 7, x_q=rest)
            assert torch.equal(h[i], alone[i][0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_batch_item_equals_single(backend, dtype):
    device, ops = backend
    x = gauss(5, 50, 70, dtype=dtype).to(device)
    h = torch.zeros(5, 70, 70, dtype=torch.float64, device=device)
    singles = h.clone()
    run(ops, h, x, 3)
    for i in range(5):
        run(ops, singles[i:i + 1], x[i:i + 1], 3)
    assert torch.equal(h, singles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row_and_column(backend, dtype):
    device, ops = backend
    x = gauss(3, 40, 50, dtype=dtype).to(device)
    clean, h = (torch.zeros(3, 50, 50, device=device) for _ in range(2))
    run(ops, clean, x, 0)
    x[1, 7, 11], x[2, 9, 49] = torch.nan, torch.inf
    run(ops, h, x, 0)
    for item, feature in ((1, 11), (2, 49)):
        bad = torch.zeros(50, 50, dtype=torch.bool, device=device)
        bad[feature] = bad[:, feature] = True
        assert (~h[item][bad].isfinite()).all() and torch.equal(h[item][~bad], clean[item][~bad])
    assert torch.equal(h[0], clean[0])


def test_empty(backend):
    device, ops = backend
    for batch, tokens, n in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        for x_q in (None, torch.zeros(batch, tokens, n, device=device)):
            h = start(batch, n).to(device)
            before = h.clone()
            new = run(ops, h, torch.zeros(batch, tokens, n, device=device), 5, x_q=x_q)
            assert new.tolist() == [5 + tokens] * batch
            assert torch.equal(h, before) or tokens
    h = start(2, 3).to(device)
    before = h.clone()
    run(ops, h, torch.ones(2, 4, 3, device=device), 0, torch.zeros(2, 4, dtype=torch.bool, device=device))
    assert torch.equal(h, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype):
    x, threads = gauss(3, 300, 300, dtype=dtype), torch.get_num_threads()
    x_q = gauss(3, 300, 300, dtype=dtype, seed=1)
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            h, d = torch.zeros(3, 300, 300), torch.zeros(3, 300, 300)
            run(torch.ops.gradops, h, x, 0, split=True)
            run(torch.ops.gradops, d, x, 0, x_q=x_q, split=True)
            results.append((h, d))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@settings(max_examples=25, deadline=None)
@given(batch=st.lists(st.integers(0, 3), max_size=2), tokens=st.lists(st.integers(0, 9), max_size=2),
       n=st.integers(0, 40), dtype=st.sampled_from(DTYPES), masked=st.booleans(), tensor=st.booleans(),
       precision=st.sampled_from(["highest", "high"]))  # fmt: skip
def test_any_shape(batch, tokens, n, dtype, masked, tensor, precision):
    x = gauss(*batch, *tokens, n, dtype=dtype) if n else torch.zeros(*batch, *tokens, n, dtype=dtype)
    mask = torch.rand(x.shape[:-1]) < 0.5 if masked else None
    h, d = torch.zeros(*batch, n, n), torch.zeros(*batch, n, n, dtype=torch.float64)
    want_h, want_d = h.double().clone(), d.clone()
    seen = torch.full(batch, 3) if tensor else 3
    x_q = x * 0.9
    for _ in range(2):
        new = hessian_update_(h, x, seen, mask=mask, precision=precision)
        want = reference.hessian_update_(want_h, x, seen, mask=mask)
        assert type(new) is type(want) and torch.equal(torch.as_tensor(new), torch.as_tensor(want))
        gptaq_cross_update_(d, x, x_q, seen, mask=mask, precision=precision)
        reference.gptaq_cross_update_(want_d, x, x_q, seen, mask=mask)
        seen = new
    torch.testing.assert_close(h.double(), want_h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d, want_d, rtol=1e-3, atol=1e-3)


def test_batches_of_tokens_add_up():
    x = gauss(300, 60)
    whole, parts, n = torch.zeros(60, 60), torch.zeros(60, 60), 0
    assert hessian_update_(whole, x, 0) == 300
    for part in x.split([1, 99, 0, 200]):
        n = hessian_update_(parts, part, n)
    assert n == 300 and error(parts, whole.double()) <= SINGLE


def test_strided_input():
    x = gauss(64, 60)
    for view in (x[::2], x[:, ::2], x.t(), x[:1].expand(5, 60), x.view(8, 8, 60).transpose(0, 1)):
        n = view.shape[-1]
        big = torch.zeros(n, 2 * n)
        strided, plain = big[:, ::2], torch.zeros(n, n)
        hessian_update_(strided, view, 0)
        hessian_update_(plain, view.contiguous(), 0)
        assert torch.equal(strided, plain) and not big[:, 1::2].any()
        d = torch.zeros(n, n)
        gptaq_cross_update_(strided.zero_(), view, view * 0.5, 0)
        gptaq_cross_update_(d, view.contiguous(), view * 0.5, 0)
        assert torch.equal(strided, d)


def test_bad_input():
    h, x = torch.zeros(3, 3), torch.ones(4, 3)
    with pytest.raises(TypeError, match="H must be a torch.Tensor, got ndarray"):
        hessian_update_(np.ones((3, 3)), x, 0)
    with pytest.raises(TypeError, match="H must be float32 or float64, got torch.bfloat16"):
        hessian_update_(h.bfloat16(), x, 0)
    with pytest.raises(ValueError, match=r"H must have shape \(\*batch, N, N\), got \(3, 2\)"):
        hessian_update_(h[:, :2], x, 0)
    with pytest.raises(TypeError, match="X must be float64"):
        hessian_update_(h, x.long(), 0)
    with pytest.raises(TypeError, match="H must be float64 where X is"):
        hessian_update_(h, x.double(), 0)
    with pytest.raises(ValueError, match=r"X must have shape \(\*tokens, 3\) to go with H of shape \(3, 3\), got"):
        hessian_update_(h, x[:, :2], 0)
    with pytest.raises(ValueError, match=r"X must have shape \(2, \*tokens, 3\)"):
        hessian_update_(torch.zeros(2, 3, 3), x, 0)
    with pytest.raises(ValueError, match="n_seen must not be negative, got -1"):
        hessian_update_(h, x, -1)
    with pytest.raises(ValueError, match="n_seen must not be negative"):
        hessian_update_(h, x, torch.tensor(-1))
    with pytest.raises(TypeError, match="n_seen must be an int or an int64 tensor, got float"):
        hessian_update_(h, x, 1.0)
    with pytest.raises(TypeError, match="n_seen must be an int or an int64 tensor, got torch.float32"):
        hessian_update_(h, x, torch.ones(()))
    with pytest.raises(ValueError, match=r"n_seen must have shape \(\), got \(2,\)"):
        hessian_update_(h, x, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask must be bool"):
        hessian_update_(h, x, 0, mask=torch.ones(4))
    with pytest.raises(ValueError, match=r"mask must have shape \(4,\), got \(3,\)"):
        hessian_update_(h, x, 0, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="precision must be one of 'highest', 'high', got 'medium'"):
        hessian_update_(h, x, 0, precision="medium")
    with pytest.raises(ValueError, match="X_q must have the shape of X_fp"):
        gptaq_cross_update_(h, x, x[:2], 0)
    with pytest.raises(TypeError, match="X_q must have the dtype of X_fp"):
        gptaq_cross_update_(h, x, x.half(), 0)
    assert not h.any()
