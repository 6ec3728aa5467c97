import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import reference, selective_log_softmax, top_p_keep

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OUTPUTS = ("logp", "lse", "entropy", "sum_p2", "sum_p3")
# The promise, absolute, for logits as given; float64 has rounding of a sum of logits of size 10 left.
TOLERANCE = dict.fromkeys(DTYPES, 3e-6) | {torch.float64: 1e-13}
# A gradient is rounded once more, to the dtype of logits.
ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def logits_of(shape, dtype, scale=3.0, seed=0):
    return (scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def index_of(shape, vocabulary, seed=1):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def keep_of(logits, index):
    """Half of the entries, and the first target."""
    keep = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    keep = keep.scatter(-1, index[..., :1], True).view(-1, logits.shape[-1])
    return keep.nonzero()[:, 1].contiguous(), torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(-1).cumsum(0)])


def exact(logits, index, **options):
    return reference.selective_log_softmax(logits.double(), index, return_=OUTPUTS, out_dtype=torch.float64, **options)


def assert_near(ours, want, tolerance):
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance / 10, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, k", [((1, 1), 1), ((3, 33), 2), ((2, 4100), 3), ((2, 2, 70), 40), ((2, 5), 0),
                                      ((0, 5), 2)])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, 20.0)])
def test_matches_float64_with_gradient(backend, shape, k, dtype, keep, temperature, softcap):
    device, ops = backend
    x, index = logits_of(shape, dtype), index_of((*shape[:-1], k), shape[-1])
    sets = keep_of(x, index) if keep and k else (None, None)
    x, index, *sets = (None if t is None else t.to(device) for t in (x, index, *sets))
    before = x.clone()
    ours = ops.selective_log_softmax(x, index, *sets, temperature, softcap or 0.0, True, True, False)
    wanted = x.double().clone().requires_grad_()
    want = exact(wanted, index, temperature=temperature, softcap=softcap, keep_ids=sets[0], keep_offsets=sets[1])
    assert_near(ours, [t.detach() for t in want], TOLERANCE[dtype])

    chosen = want[0].isfinite()
    weights = [logits_of(t.shape, torch.float64, 1.0, seed=3).to(device) for t in ours[:3]]
    total = (weights[0] * want[0])[chosen].sum() + (weights[1] * want[1] + weights[2] * want[2]).sum()
    weights[0] = weights[0] * chosen
    grad, = torch.autograd.grad(total, wanted)
    args = index, *sets, *ours[1:3], *weights, temperature, softcap or 0.0
    ours_grad = ops.selective_log_softmax_backward(x, *args)
    assert ours_grad.dtype == dtype and torch.equal(x, before)
    largest = grad.abs().amax(-1, keepdim=True) if grad.numel() else 0
    assert ((ours_grad.double() - grad).abs() <= ROUNDING[dtype] * (1 + (softcap or 0) / 15) * largest).all()
    ops.selective_log_softmax_backward_(x, *args)
    assert torch.equal(x, ours_grad)


def test_subnormal_logits():
    x = (6e-5 * torch.rand(2, 700, generator=torch.Generator().manual_seed(0))).half()
    ids, offsets = torch.arange(700).repeat(2), torch.tensor([0, 700, 1400])
    for sets in ({}, {"keep_ids": ids, "keep_offsets": offsets}):
        ours = selective_log_softmax(x, index_of((2,), 700), return_=OUTPUTS, out_dtype=torch.float64, **sets)
        assert_near(ours, exact(x, index_of((2,), 700)), 3e-6)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=2), vocabulary=st.integers(1, 70), k=st.integers(0, 4),
       dtype=st.sampled_from(DTYPES),
       out_dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_any_shape(shape, vocabulary, k, dtype, out_dtype, seed):
    x = logits_of((*shape, vocabulary), dtype, seed=seed)
    index = index_of(shape if k == 0 else (*shape, k), vocabulary).to(torch.int32 if seed % 2 else torch.int64)
    ours = selective_log_softmax(x, index, return_=OUTPUTS, out_dtype=out_dtype)
    want = exact(x, index.long())
    assert all(t.dtype == out_dtype and t.shape == w.shape for t, w in zip(ours, want, strict=True))
    assert_near(ours, want, 3e-6)
    lse, logp = selective_log_softmax(x, index, return_=["lse", "logp"], out_dtype=out_dtype)
    assert torch.equal(lse, ours[1]) and torch.equal(logp, ours[0])


def hard_rows(vocabulary):
    """Logits on which others lose digits or their heads."""
    x = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    spike = torch.full((vocabulary,), -0.1)
    spike[vocabulary // 2] = 0
    masked = torch.where(torch.arange(vocabulary) % 10 == 3, x, -torch.inf)
    late = torch.cat([torch.full((vocabulary // 2,), -torch.inf), x[vocabulary // 2:] - 200])
    return {"constant": torch.full((vocabulary,), 3.3), "one above": spike,
            "ascending": torch.linspace(-300, 300, vocabulary), "descending": torch.linspace(300, -300, vocabulary),
            "rising slowly": torch.linspace(0, 10, vocabulary),
            "+1e4": x * 3 + 1e4, "-1e4": x * 3 - 1e4, "+-1e4": x * 1e4, "huge": x * 1e30, "masked": masked,
            "masked first": late, "gaussian": 3 * x}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_at_full_vocabulary(dtype):
    x = torch.stack(list(hard_rows(152_000).values())).to(dtype)
    index = torch.stack([x.double().argmax(-1), index_of((len(x),), x.shape[-1])], -1)
    for temperature in (1.0, 0.3):
        ours = selective_log_softmax(x, index, temperature=temperature, return_=OUTPUTS, out_dtype=torch.float64)
        want = exact(x, index, temperature=temperature)
        assert (ours[0] <= 0).all() and (ours[2] >= 0).all()
        same = ours[0] == want[0]  # among them -inf
        assert ((ours[0] - want[0]).abs()[~same] <= 3e-6).all()
        for a, b in zip(ours[2:], want[2:], strict=True):
            assert ((a - b).abs() <= 3e-6).all()


def test_hard_rows_on_every_backend(backend):
    device, ops = backend
    x = torch.stack([t.to(device) for t in hard_rows(700).values()])
    index = torch.stack([x.argmax(-1), index_of((len(x),), 700).to(device)], -1)
    ours = ops.selective_log_softmax(x, index, None, None, 1.0, 0.0, True, True, False)
    want = exact(x, index)
    assert (ours[0] <= 0).all()
    for i in (0, 2, 3, 4):
        same = ours[i] == want[i]
        assert ((ours[i] - want[i]).abs()[~same] <= 3e-6).all()


def test_masked_and_nan_rows(backend):
    device, ops = backend
    for dtype in DTYPES:
        x = logits_of((5, 5000), dtype).to(device)
        index = torch.tensor([[7, 2]] * 5, device=device)
        alone = [ops.selective_log_softmax(x[r], index[r], None, None, 1.0, 0.0, True, True, False) for r in range(5)]
        x[1], x[2, 4321], x[3, 7] = -torch.inf, torch.nan, -torch.inf
        logp, lse, entropy, *_ = out = ops.selective_log_softmax(x, index, None, None, 1.0, 0.0, True, True, False)
        assert logp[1:3].isnan().all() and lse[1] == -torch.inf and lse[2].isnan() and entropy[1:3].isnan().all()
        assert logp[3, 0] == -torch.inf and logp[3, 1].isfinite() and entropy[3].isfinite()
        assert all(torch.equal(out[i][r], alone[r][i]) for i in range(5) for r in (0, 4))
        ones = torch.ones_like(logp[:, :1])
        grad = ops.selective_log_softmax_backward(x, index[:, 1:], None, None, lse, entropy, ones, None,
                                                  ones[:, 0], 1.0, 0.0)
        assert grad[1:3].isnan().all() and grad[[0, 3, 4]].isfinite().all() and grad[3, 7] == 0
        ones[1:3] = 0  # a row without incoming gradients is not even read
        grad = ops.selective_log_softmax_backward(x, index[:, 1:], None, None, lse, entropy, ones, None, None, 1.0, 0.0)
        assert (grad[1:3] == 0).all() and (grad[0] != 0).any()


def test_entries_held_elsewhere(backend):
    """A vocabulary in two parts: what a group of processes would add up."""
    device, ops = backend
    x, index = logits_of((4, 600), torch.float32).to(device), index_of((4, 2), 600).to(device)
    whole = ops.selective_log_softmax(x, index, None, None, 0.7, 0.0, True, False, False)
    parts = []
    for first in (0, 300):
        local = index - first
        local = torch.where((local >= 0) & (local < 300), local, -1)
        part = x[:, first:first + 300]
        parts.append((local, part, *ops.selective_log_softmax(part, local, None, None, 0.7, 0.0, True, False, True)))
    lse = torch.logaddexp(parts[0][3], parts[1][3])
    target = sum(torch.where(p[0] >= 0, p[2] + p[3][:, None], 0) for p in parts)
    torch.testing.assert_close(target - lse[:, None], whole[0], atol=3e-6, rtol=0)
    grads = torch.ones_like(whole[0]), 0.5 * torch.ones_like(lse), 0.3 * torch.ones_like(lse)
    want = ops.selective_log_softmax_backward(x, index, None, None, *whole[1:3], *grads, 0.7, 0.0)
    ours = [ops.selective_log_softmax_backward(part, local, None, None, *whole[1:3], *grads, 0.7, 0.0)
            for local, part, *_ in parts]
    torch.testing.assert_close(torch.cat(ours, -1), want, atol=1e-7, rtol=0)


def test_batch_item_equals_single_and_strides(backend):
    device, ops = backend
    x, index = logits_of((3, 4, 701), torch.bfloat16).to(device), index_of((3, 4, 2), 701).to(device)
    rest = None, None, 1.0, 0.0, True, True, False
    whole = ops.selective_log_softmax(x, index, *rest)
    for i in range(3):
        for j in range(4):
            one = ops.selective_log_softmax(x[i, j], index[i, j], *rest)
            assert all(torch.equal(a[i, j], b) for a, b in zip(whole, one, strict=True))
    for view in (x.transpose(0, 1), x[:, ::2], x[:1].expand(5, 4, 701), x[..., ::3]):
        at = index[0, 0].expand(*view.shape[:-1], 2) % view.shape[-1]
        for a, b in zip(ops.selective_log_softmax(view, at, *rest),
                        ops.selective_log_softmax(view.clone(), at.clone(), *rest), strict=True):
            assert torch.equal(a, b)


def test_threads_change_no_bit():
    x, index = logits_of((2, 152_000), torch.bfloat16), index_of((2, 1), 152_000)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            out = selective_log_softmax(leaf, index, return_=("logp", "entropy"))
            results.append([*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), leaf)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_large_gradients_share_no_memory_that_is_in_use():
    x, index = logits_of((65, 33_000), torch.float32).requires_grad_(), index_of((65,), 33_000)

    def gradient(factor=1.0):
        return torch.autograd.grad(factor * selective_log_softmax(x, index).sum(), x)[0]

    first = gradient()
    want, row, place = first.clone(), first[64], first.data_ptr()
    del first
    others = [gradient(2.0) for _ in range(4)]  # a view keeps the memory
    assert torch.equal(row, want[64]) and all(torch.equal(g, 2 * want) for g in others)
    del row, others
    again = [gradient() for _ in range(4)]
    assert all(torch.equal(g, want) for g in again) and len({g.data_ptr() for g in again}) == 4
    places = {g.data_ptr() for g in again} | {place}
    del again
    if torch.__version__ >= "2.11":
        assert gradient().data_ptr() in places


def test_gradients_larger_than_caches():
    x = logits_of((100_003,), torch.float32) * torch.linspace(0.1, 2, 168)[:, None]  # a row is no whole vectors
    index = index_of((168,), 100_003)

    def gradient(x, index):
        x = x.requires_grad_()
        return torch.autograd.grad(sum(t.sum() for t in selective_log_softmax(x, index, return_=OUTPUTS[:3])), x)[0]

    whole = gradient(x, index)
    for rows in (slice(0, 3), slice(150, 168)):
        assert torch.equal(whole[rows], gradient(x.detach()[rows], index[rows]))


OPTIONS = [{}, {"temperature": 0.6, "softcap": 3.0}, {"keep": True}, {"keep": True, "renormalize": False}]


@pytest.mark.parametrize("options", OPTIONS)
def test_derivatives(options):
    options = dict(options)
    x, index = logits_of((2, 5), torch.float64), index_of((2, 2), 5)
    x[0, (index[0, 0] + 1) % 5] = -torch.inf
    if options.pop("keep", False):
        index[:, 1] = index[:, 0]  # in the set, and chosen twice
        options["keep_ids"], options["keep_offsets"] = keep_of(x, index)
    index[0] = index[0, 0]
    free = x.isfinite()

    def f(values):
        full = torch.full_like(x, -torch.inf).masked_scatter(free, values)
        return selective_log_softmax(full, index, return_=OUTPUTS, out_dtype=torch.float64, **options)

    values = x[free].clone().requires_grad_()
    assert torch.autograd.gradcheck(f, (values,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda v: sum(t[t.isfinite()].square().sum() for t in f(v)), (values,))
    # the kernels' own path: no moments, no second derivative
    leaf = x.clone().requires_grad_()
    ours = selective_log_softmax(leaf, index, return_=OUTPUTS[:3], out_dtype=torch.float64, **options)
    want = exact(leaf, index, **options)[:3]
    a, = torch.autograd.grad(sum(t.square().sum() for t in ours), leaf)
    b, = torch.autograd.grad(sum(t.square().sum() for t in want), leaf)
    torch.testing.assert_close(a[free], b[free])
    assert (a[~free] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_has_the_dtype_of_logits(dtype):
    x, index = logits_of((4, 50), dtype).requires_grad_(), index_of((4,), 50)
    grad, = torch.autograd.grad(selective_log_softmax(x, index).sum(), x)
    assert grad.dtype == dtype
    twice, = torch.autograd.grad(selective_log_softmax(x, index, out_dtype=torch.float64).square().sum(), x,
                                 create_graph=True)
    assert twice.dtype == dtype and torch.autograd.grad(twice.float().square().sum(), x)[0].abs().max() > 0


def test_keep_sets():
    x = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 9.0]])
    ids, offsets = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 2, 5])
    index = torch.tensor([[1, 2], [0, 3]])
    logp, entropy = selective_log_softmax(x, index, keep_ids=ids.int(), keep_offsets=offsets,
                                          return_=("logp", "entropy"))
    torch.testing.assert_close(logp, torch.tensor([[-1.3133, -torch.inf], [-1.0986, -torch.inf]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy, torch.tensor([0.5822, 1.0986]), atol=1e-4, rtol=0)
    logp, entropy = selective_log_softmax(x, index, keep_ids=ids, keep_offsets=offsets, renormalize=False,
                                          return_=("logp", "entropy"))
    full = x.log_softmax(-1)
    torch.testing.assert_close(logp[:, 0], full[[0, 1], [1, 0]])
    assert (logp[:, 1] == -torch.inf).all()
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    sets = top_p_keep(x, 0.9)
    torch.testing.assert_close(selective_log_softmax(x, index, keep_ids=sets[0], keep_offsets=sets[1]),
                               reference.selective_log_softmax(x, index, keep_ids=sets[0], keep_offsets=sets[1]))


def test_the_errors_of_others():
    """TRL and F.cross_entropy lose two digits in bfloat16; a fused log-prob of verl's was +123 (its issue 2656)."""
    x, index = logits_of((64, 32_000), torch.bfloat16), index_of((64,), 32_000)
    want = exact(x, index)[0]
    theirs = -torch.nn.functional.cross_entropy(x, index, reduction="none").double()
    assert (theirs - want).abs().max() > 1e-2 and (selective_log_softmax(x, index).double() - want).abs().max() < 3e-6
    x = torch.full((1, 1000), -1e4)
    x[0, 3] = 1e4
    assert selective_log_softmax(x, torch.tensor([[3, 4]])).tolist() == [[0.0, -2e4]]


def test_against_trl():
    utils = pytest.importorskip("trl.trainer.utils")
    x, index = logits_of((3, 5, 900), torch.float32), index_of((3, 5), 900)
    torch.testing.assert_close(selective_log_softmax(x, index, temperature=0.9),
                               utils.selective_log_softmax(x / 0.9, index), atol=5e-6, rtol=0)
    torch.testing.assert_close(selective_log_softmax(x, index, return_=("entropy",)), utils.entropy_from_logits(x),
                               atol=5e-6, rtol=0)


def test_bad_input():
    x, index = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="logits must be a torch.Tensor, got ndarray"):
        selective_log_softmax(np.ones((2, 2)), index)
    with pytest.raises(TypeError, match="logits must be float64"):
        selective_log_softmax(index, index)
    with pytest.raises(ValueError, match="logits must have at least 1 dimension"):
        selective_log_softmax(torch.tensor(1.0), index)
    with pytest.raises(TypeError, match="index must be int32 or int64, got torch.float32"):
        selective_log_softmax(x, index.float())
    for bad in (index[:1], torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 1, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="index must have the shape"):
            selective_log_softmax(x, bad)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            selective_log_softmax(x, index, temperature=temperature)
    with pytest.raises(ValueError, match="softcap must be positive"):
        selective_log_softmax(x, index, softcap=0.0)
    for names in ("logp", (), ("logp", "kl")):
        with pytest.raises(ValueError, match="return_ must be a sequence of names"):
            selective_log_softmax(x, index, return_=names)
    with pytest.raises(TypeError, match="out_dtype must be"):
        selective_log_softmax(x, index, out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must be given together"):
        selective_log_softmax(x, index, keep_ids=index)
    with pytest.raises(ValueError, match="keep_offsets must have one entry more"):
        selective_log_softmax(x, index, keep_ids=index, keep_offsets=index)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_bad_index_on_cpu(bad):
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=rf"index must be in \[0, 3\), got {bad}"):
        selective_log_softmax(x, torch.tensor([0, bad]))


@pytest.mark.parametrize("ids, offsets", [([0, 3], [0, 1, 2]), ([-1, 1], [0, 1, 2]), ([1, 0], [0, 2, 2]),
                                          ([1, 1], [0, 2, 2]), ([0, 1], [0, 2, 1]), ([0, 1], [0, 5, 2]),
                                          ([0, 1], [1, 1, 2]), ([0, 1], [0, 1, 1])])
def test_bad_keep_sets_on_cpu(ids, offsets):
    sets = torch.tensor(ids), torch.tensor(offsets)
    x, index = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="keep_"):
        torch.ops.gradops.selective_log_softmax(x, index, *sets, 1.0, 0.0, False, False, False)
    with pytest.raises(ValueError, match="keep_"):
        torch.ops.gradops.selective_log_softmax_backward(x, index, *sets, torch.zeros(2, dtype=torch.float64),
                                                         *[None] * 4, 1.0, 0.0)
