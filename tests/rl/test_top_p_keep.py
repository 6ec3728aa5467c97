import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import reference, top_p_keep

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SLACK = dict.fromkeys(DTYPES, 1e-6) | {torch.float64: 1e-14}  # what a sum of float32 may lose


def logits_of(shape, dtype, seed=0):
    return (3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_nucleus(mask, logits, p, min_keep, slack):
    """mask is a set of the likeliest with enough mass, and no smaller one is."""
    for row, x in zip(mask, logits.double(), strict=True):
        order = torch.sort(x, descending=True, stable=True).indices
        count = int(row.sum())
        assert row[order[:count]].all()
        mass = x.softmax(-1)[order].cumsum(-1)
        assert count >= min(min_keep, len(x)) and mass[count - 1] >= p - slack
        assert count <= min_keep or mass[count - 2] < p + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p, min_keep", [(0.5, 1), (0.95, 30), (1e-9, 1)])
def test_nucleus(backend, dtype, p, min_keep):
    device, ops = backend
    for shape in ((3, 300), (2, 1), (1, 4200 if dtype == torch.float32 else 310)):
        x = logits_of(shape, dtype).to(device)
        assert_nucleus(ops.top_p_keep(x, p, min_keep).cpu(), x.cpu(), p, min_keep, SLACK[dtype])


def test_ties_go_by_id_and_rows_without_a_softmax_are_whole(backend):
    device, ops = backend
    x = torch.zeros(6, 70, device=device)
    x[1, 5], x[2], x[3, 0], x[4, 10:] = torch.nan, -torch.inf, torch.inf, -torch.inf
    x[5, ::2] = -0.0
    mask = ops.top_p_keep(x, 0.5, 1)
    assert torch.equal(mask[0].nonzero()[:, 0].cpu(), torch.arange(35))
    assert mask[1:4].all() and mask[4].sum() == 5 and torch.equal(mask[5], mask[0])
    mask = ops.top_p_keep(x, 1.0, 20)
    assert mask[0].all() and torch.equal(mask[4].nonzero()[:, 0].cpu(), torch.arange(20))
    assert ops.top_p_keep(x[4:5], 1.0, 1).sum() == 10


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=2), vocabulary=st.integers(1, 40), p=st.floats(0.01, 1.0),
       min_keep=st.integers(1, 9), always=st.integers(0, 3), seed=st.integers(0, 99))
def test_matches_reference(shape, vocabulary, p, min_keep, always, seed):
    x = logits_of((*shape, vocabulary), torch.float64, seed).round(decimals=1)  # with ties
    always_keep = None
    if always:
        rows = shape if always == 1 else []
        always_keep = torch.randint(vocabulary, (*rows, always), generator=torch.Generator().manual_seed(seed))
    ids, offsets = top_p_keep(x, p, always_keep, min_keep)
    want_ids, want_offsets = reference.top_p_keep(x, p, always_keep, min_keep)
    assert torch.equal(ids, want_ids) and torch.equal(offsets, want_offsets)


def test_strides_and_threads():
    x = logits_of((64, 900), torch.float32)
    want = top_p_keep(x.t().contiguous(), 0.8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(top_p_keep(x.t(), 0.8), want, strict=True))
    finally:
        torch.set_num_threads(before)


def test_bad_input():
    x = torch.zeros(2, 3)
    for p in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"p must be in \(0, 1\]"):
            top_p_keep(x, p)
    with pytest.raises(ValueError, match="min_keep must be at least 1"):
        top_p_keep(x, 0.5, min_keep=0)
    with pytest.raises(TypeError, match="logits must be"):
        top_p_keep(x.long(), 0.5)
    with pytest.raises(ValueError, match="always_keep must have shape"):
        top_p_keep(x, 0.5, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"always_keep must be in \[0, 3\), got 3"):
        top_p_keep(x, 0.5, torch.tensor([3]))
    with pytest.raises(RuntimeError, match="asks for a derivative"):
        top_p_keep(x.requires_grad_(), 0.5)
