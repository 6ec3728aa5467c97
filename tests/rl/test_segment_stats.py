import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist

from gradops.rl import SegmentStats, all_reduce_stats, merge_stats, reference, segment_stats

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check(ours, want, x):
    """The mean is within rounding of the largest number, m2 within that of itself."""
    for name, a, b in zip(SegmentStats._fields, ours, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-11, atol=1e-13, equal_nan=True,
                                   msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [(), ("valid",), ("weights",), ("valid", "weights")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(backend, dtype, options):
    device, ops = backend
    g = torch.Generator().manual_seed(0)
    sizes = [0, 1, 5, 300, 0, 33]
    x = torch.randn(339, generator=g).to(dtype)
    more = {"valid": torch.rand(339, generator=g) < 0.6, "weights": torch.rand(339, generator=g, dtype=torch.float64)}
    more = {k: more[k] for k in options}
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    on = {k: v.to(device) for k, v in more.items()}
    s = ops.segment_stats(x.to(device), offsets.to(device), None, on.get("valid"), on.get("weights"), 0)
    check(s.unbind(-2), reference.segment_stats(x, offsets=offsets, **more), x)
    order = torch.randperm(339, generator=g)
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))[order].to(device)
    shuffled = ops.segment_stats(x[order].to(device), None, ids, *((on[k][order.to(device)] if k in on else None)
                                                                   for k in ("valid", "weights")), 6)
    assert torch.equal(shuffled, s)  # no bit depends on the order


def test_empty(backend):
    device, ops = backend
    x = torch.empty(0, device=device)
    numbers = torch.empty(0, dtype=torch.int64, device=device)
    for s in (ops.segment_stats(x, torch.zeros(3, dtype=torch.int64, device=device), None, None, None, 0),
              ops.segment_stats(x, None, numbers, None, None, 2)):
        assert s.tolist() == [[0, 0], [0, 0], [0, 0], [math.inf] * 2, [-math.inf] * 2]
    assert ops.segment_stats(x, None, numbers, None, None, 0).shape == (5, 0)


def test_nan_stays_in_its_group(backend):
    device, ops = backend
    x = torch.tensor([1.0, torch.nan, 3.0, 4.0], device=device)
    s = SegmentStats(*ops.segment_stats(x, torch.tensor([0, 2, 4], device=device), None, None, None, 0))
    assert all(t[0].isnan() for t in s[1:]) and s.count.tolist() == [2, 2] and s.mean[1] == 3.5 and s.m2[1] == 0.5


def test_numbers_out_of_range():
    x = torch.ones(3)
    for ids in ([0, 1, 2], [-1, 0, 0]):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, 2\), got {max(ids) if max(ids) > 1 else min(ids)}"):
            segment_stats(x, ids=torch.tensor(ids), num_groups=2)


def test_merge():
    x = torch.randn(90, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    ids = torch.arange(90) % 4
    ids[60:] = ids[60:] % 2  # groups 2 and 3 are empty in the second part
    whole = segment_stats(x, ids=ids, num_groups=5)
    parts = [segment_stats(x[a:b], ids=ids[a:b], num_groups=5) for a, b in ((0, 60), (60, 90))]
    for merged in (merge_stats(*parts), merge_stats(*parts[::-1])):
        for ours, want in zip(merged, whole, strict=True):
            # The parts' means, near 1e6, are rounded by 1e-10, and so is their difference, near 1.
            torch.testing.assert_close(ours, want, rtol=1e-9, atol=0)
    empty = segment_stats(x[:0], ids=ids[:0], num_groups=5)
    for merged in (merge_stats(whole, empty), merge_stats(empty, whole)):
        assert all(torch.equal(a, b) for a, b in zip(merged, whole, strict=True))


def rank_main(rank, world, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(101, generator=g, dtype=torch.float64) + 50, torch.randint(0, 4, (101,), generator=g)
    x[ids == 3] = 7
    mine = slice(rank, None, world - 1) if rank < world - 1 else slice(0, 0)  # the last rank has nothing
    total = all_reduce_stats(segment_stats(x[mine], ids=ids[mine], num_groups=4))
    whole = segment_stats(x, ids=ids, num_groups=4)
    results.put([torch.stack(tuple(s)).tolist() for s in (total, whole)])
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_all_reduce(tmp_path, world):
    fork = multiprocessing.get_context("fork")  # no second import of torch
    results = fork.SimpleQueue()
    ranks = [fork.Process(target=rank_main, args=(rank, world, tmp_path / "store", results)) for rank in range(world)]
    for p in ranks:
        p.start()
    totals = [results.get() for _ in ranks]
    for p in ranks:
        p.join(60)
    assert [p.exitcode for p in ranks] == [0] * world
    for total, whole in totals:
        assert total == totals[0][0]  # the same bits on every rank
        torch.testing.assert_close(torch.tensor(total), torch.tensor(whole), rtol=1e-12, atol=1e-12)
        assert total[2][3] == 0  # equal numbers everywhere: no residue


def test_bad_input():
    x = torch.ones(3)
    ids = torch.zeros(3, dtype=torch.int64)
    for error, match, call in [
        (TypeError, "x must be float64", lambda: segment_stats(x.long(), ids=ids, num_groups=1)),
        (ValueError, "x must have 1 dimension", lambda: segment_stats(torch.ones(3, 1), ids=ids, num_groups=1)),
        (ValueError, "exactly one of offsets and ids must be given, got none", lambda: segment_stats(x)),
        (ValueError, "num_groups must be given with ids", lambda: segment_stats(x, ids=ids)),
        (ValueError, "num_groups must not be negative", lambda: segment_stats(x, ids=ids, num_groups=-1)),
        (ValueError, "ids must have one entry for each of x", lambda: segment_stats(x, ids=ids[:2], num_groups=1)),
        (TypeError, "weights must hold real numbers", lambda: segment_stats(x, ids=ids, num_groups=1, weights=x > 0)),
        (RuntimeError, "x asks for a derivative",
         lambda: segment_stats(torch.ones(3, requires_grad=True), ids=ids, num_groups=1)),
        (TypeError, "b must be a SegmentStats", lambda: merge_stats(segment_stats(x, ids=ids, num_groups=1), x)),
        (ValueError, "a and b must have the same groups",
         lambda: merge_stats(*(segment_stats(x, ids=ids, num_groups=n) for n in (1, 2)))),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()
