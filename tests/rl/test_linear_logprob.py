import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradops.rl import linear_logprob, reference

EVERYTHING = ("logp", "lse", "entropy", "sum_p2", "sum_p3")
# Sums of H products in float32, 16-bit products being exact; float16 and bfloat16 input is what it is.
ERROR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # Frobenius


def make(rows, h, v, dtype=torch.float64, k=None, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = rows if isinstance(rows, tuple) else (rows,)
    hidden = torch.randn(*rows, h, generator=g, dtype=torch.float64)
    weight = scale * torch.randn(v, h, generator=g, dtype=torch.float64) / max(h, 1) ** 0.5
    bias = torch.randn(v, generator=g, dtype=torch.float64)
    targets = torch.randint(0, v, rows if k is None else (*rows, k), generator=g)
    return hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def objective(results):
    """A scalar that asks every result for a gradient of its own."""
    w = torch.Generator().manual_seed(1)
    return sum((y.double() * torch.randn(y.shape, generator=w, dtype=torch.float64)).sum() for y in results)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, 4), max_size=2), h=st.integers(1, 9), v=st.integers(1, 40),
       k=st.sampled_from([None, 1, 3]), dtype=st.sampled_from(list(ERROR)), chunk=st.integers(1, 5),
       biased=st.booleans(), temperature=st.sampled_from([1.0, 0.6]), softcap=st.sampled_from([None, 4.0]))
def test_matches_float64(rows, h, v, k, dtype, chunk, biased, temperature, softcap):
    hidden, weight, targets, bias = make(tuple(rows), h, v, dtype, k)
    bias = bias if biased else None
    settings = {"temperature": temperature, "softcap": softcap, "return_": EVERYTHING, "out_dtype": torch.float64}
    ours = linear_logprob(hidden, weight, targets, bias, chunk_size=chunk, **settings)
    want = reference.linear_logprob(hidden.double(), weight.double(), targets,
                                    None if bias is None else bias.double(), **settings)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=ERROR[dtype], atol=ERROR[dtype])


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("scale", [2.0, 12.0])  # flat rows, and rows where a token or two have all the mass
@pytest.mark.parametrize("dtype", list(ERROR))
def test_gradients_match_float64(dtype, scale, softcap):
    inputs = make(70, 64, 3000, dtype, k=2, scale=scale)
    inputs[2][:, 0] = (inputs[0].double() @ inputs[1].double().mT + inputs[3].double()).argmax(-1)
    settings = {"temperature": 0.9, "softcap": softcap, "return_": ("logp", "lse", "entropy"), "chunk_size": 32,
                "out_dtype": torch.promote_types(dtype, torch.float32)}
    h, w, b = leaves(*(inputs[i] for i in (0, 1, 3)))
    y = linear_logprob(h, w, inputs[2], b, **settings)
    ours = torch.autograd.grad(objective(y), (h, w, b))
    h64, w64, b64 = leaves(*(inputs[i].double() for i in (0, 1, 3)))
    want_y = reference.linear_logprob(h64, w64, inputs[2], b64, **settings | {"out_dtype": torch.float64})
    want = torch.autograd.grad(objective(want_y), (h64, w64, b64))
    for a, x, wanted in zip(ours, (h, w, b), want, strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert relative(a, wanted) < GRADIENT[dtype]
    for a, wanted in zip(y, want_y, strict=True):
        assert (a - wanted).abs().max() < ERROR[dtype] * max(1, scale)


def test_derivatives_in_float64():
    hidden, weight, targets, bias = make(3, 4, 5, k=2)

    def f(h, w, b, names=("logp", "lse", "entropy")):
        return linear_logprob(h, w, targets, b, temperature=0.7, softcap=3.0, return_=names, chunk_size=2,
                              out_dtype=torch.float64)

    inputs = leaves(hidden, weight, bias)
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    moments = ("sum_p3", "sum_p2")
    (ours,), (want,) = ([t] for t in (
        torch.func.jvp(lambda *x: f(*x, names=moments), (hidden, weight, bias), (hidden, weight + 1, bias))[1],
        torch.func.jvp(lambda h, w, b: reference.linear_logprob(
            h, w, targets, b, temperature=0.7, softcap=3.0, return_=moments, out_dtype=torch.float64),
            (hidden, weight, bias), (hidden, weight + 1, bias))[1]))
    torch.testing.assert_close(ours, want)
    with pytest.raises(RuntimeError, match="sum_p2 and sum_p3 have no derivative"):
        f(*inputs, names=("logp", "sum_p2"))[1].sum().backward()
    f(*inputs, names=("logp", "sum_p2"))[0].sum().backward()
    grad, = torch.autograd.grad(f(*inputs)[0].sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_what_is_asked_for(which):
    hidden, weight, targets, bias = make(5, 4, 7)
    inputs = [hidden, weight, bias]
    want = torch.autograd.grad(linear_logprob((x := leaves(*inputs))[0], x[1], targets, x[2]).sum(), x)[which]
    inputs[which] = inputs[which].clone().requires_grad_()
    linear_logprob(inputs[0], inputs[1], targets, inputs[2]).sum().backward()
    assert torch.equal(inputs[which].grad, want)


def test_chunks_change_no_more_than_torchs_products_do():
    hidden, weight, targets, bias = make((3, 7), 8, 50)
    results = []
    for chunk in (1, 4, 21, 4096):
        h, w, b = leaves(hidden, weight, bias)
        y = linear_logprob(h, w, targets, b, chunk_size=chunk, return_=EVERYTHING[:3])
        results.append([*y, *torch.autograd.grad(objective(y), (h, w, b))])
    for r in results[1:]:
        for a, b in zip(r, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-12, atol=1e-12)


def test_masked_tokens():
    """A bias of -inf masks a token, and here all of a part of the vocabulary, or all tokens of a row."""
    hidden, weight, _, bias = make(3, 8, 50)
    bias[:10], targets = -torch.inf, torch.tensor([[3, 20], [4, 21], [49, 9]])
    for dtype in (torch.float64, torch.bfloat16):
        args = hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)
        h, w, b = leaves(args[0], args[1], args[3])
        ours = linear_logprob(h, w, targets, b, chunk_size=5, return_=EVERYTHING)
        want = reference.linear_logprob(*(x.double() if x.is_floating_point() else x for x in args), return_=EVERYTHING)
        for a, c in zip(ours, want, strict=True):
            torch.testing.assert_close(a, c, rtol=2e-5, atol=2e-5)
        assert (ours[0] == -torch.inf).sum() == 3
        grads = torch.autograd.grad(ours[1].sum() + ours[2].sum(), (h, w, b))
        assert all(g.isfinite().all() for g in grads) and (grads[1][:10] == 0).all() and (grads[2][:10] == 0).all()
    nothing = linear_logprob(hidden, weight, targets, torch.full_like(bias, -torch.inf), chunk_size=20)
    assert nothing.isnan().all()


def test_weight_gradient_in_float32():
    hidden, weight, targets, _ = make(600, 16, 40, torch.bfloat16)
    w = weight.clone().requires_grad_()
    w.grad_dtype = torch.float32
    linear_logprob(hidden, w, targets).sum().backward()
    assert w.grad.dtype == torch.float32
    assert (w.grad != w.grad.bfloat16()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(dtype):
    hidden, weight, targets, _ = make(6, 8, 30, dtype)
    want, = torch.autograd.grad(linear_logprob((x := hidden.clone().requires_grad_()), weight, targets).sum(), x)
    hidden[2, 3] = torch.nan
    hidden.requires_grad_()
    y = linear_logprob(hidden, weight, targets)
    grad, = torch.autograd.grad(y.sum(), hidden)
    keep = torch.arange(6) != 2
    assert y[2].isnan() and not y[keep].isnan().any()
    assert grad[2].isnan().all() and torch.equal(grad[keep], want[keep])


def test_strided_and_empty_input():
    hidden, weight, targets, bias = make((4, 6), 10, 30, torch.float32)
    views = [(hidden[::2, 1:], weight, targets[::2, 1:]), (hidden, weight.mT.contiguous().mT, targets),
             (hidden[:, :1].expand(4, 3, 10), weight, targets[:, :1].expand(4, 3)),
             (hidden[..., ::2], weight[..., ::2], targets)]
    for h, w, t in views:
        a = linear_logprob(h, w, t, bias, return_=EVERYTHING)
        b = linear_logprob(h.clone(), w.clone(memory_format=torch.contiguous_format), t.clone(), bias,
                           return_=EVERYTHING)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)
    h, w = leaves(hidden[:0], weight)
    y = linear_logprob(h, w, targets[:0])
    assert y.shape == (0, 6)
    y.sum().backward()
    assert h.grad.shape == h.shape and (w.grad == 0).all()


def test_agrees_with_torchs_cross_entropy():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    hidden, weight, targets, _ = make(20, 16, 100, torch.float32)
    theirs = torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(-linear_logprob(hidden, weight, targets), theirs, rtol=1e-5, atol=1e-5)


def test_bad_input():
    hidden, weight, targets, bias = make(3, 4, 5, torch.float32)
    for args, error, match in (
        ((np.ones((3, 4)), weight, targets), TypeError, "hidden must be a torch.Tensor, got ndarray"),
        ((targets, weight, targets), TypeError, "hidden must be float64"),
        ((hidden, weight.double(), targets), TypeError, "weight must have the dtype of hidden"),
        ((hidden, weight, hidden[:, 0]), TypeError, "targets must be int32 or int64"),
        ((hidden, weight, targets, bias.double()), TypeError, "bias must have the dtype of hidden"),
        ((hidden, weight[:, :3], targets), ValueError, r"weight must have the shape \(V, 4\)"),
        ((hidden, weight[:0], targets), ValueError, "V > 0"),
        ((hidden, weight, targets[:2]), ValueError, r"targets must have the shape \(3,\)"),
        ((hidden, weight, targets, bias[:2]), ValueError, r"bias must have the shape \(5,\)"),
    ):
        with pytest.raises(error, match=match):
            linear_logprob(*args)
    for bad, error in (({"temperature": 0.0}, ValueError), ({"softcap": -1.0}, ValueError),
                       ({"return_": "logp"}, ValueError), ({"return_": ("p",)}, ValueError),
                       ({"out_dtype": torch.bfloat16}, TypeError), ({"chunk_size": 0}, ValueError)):
        with pytest.raises(error, match=next(iter(bad))):
            linear_logprob(hidden, weight, targets, **bad)
    for target in (-1, 5):
        with pytest.raises(ValueError, match=r"targets must be in \[0, 5\)"):
            linear_logprob(hidden, weight, torch.full((3,), target))


# Two processes hold 30 and 20 rows of the weight; each compares with the whole in one process.
PARALLEL = """
import sys, torch, torch.distributed as dist
from gradops.rl import linear_logprob
rank, store = {rank}, "{store}"
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
group = dist.group.WORLD
g = torch.Generator().manual_seed(0)
part = slice(0, 30) if rank == 0 else slice(30, 50)
names = ("logp", "lse", "entropy", "sum_p2", "sum_p3")
def close(a, b, tolerance):
    assert (a.double() - b.double()).abs().max() <= tolerance * (1 + b.double().abs().max())
def run(dtype, tolerance, softcap=None):
    hidden, weight, bias, up = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
                                for s in ((9, 8), (50, 8), (50,), (4, 9)))
    targets = torch.randint(0, 50, (9, 2), generator=g)
    out = []
    for w, b, extra in ((weight[part], bias[part], dict(group=group, vocab_start=part.start)), (weight, bias, dict())):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, w, b))
        y = linear_logprob(h, w, targets, b, temperature=0.8, softcap=softcap, return_=names, out_dtype=torch.float64,
                           chunk_size=4, **extra)
        loss = (y[0] * up[:2].T).sum() + (y[1] * up[2]).sum() + (y[2] * up[3]).sum()
        out.append([t.detach() for t in (*y, *torch.autograd.grad(loss, (h, w, b)))])
    (*ours, dw, db), (*whole, dw_whole, db_whole) = out
    for a, b in zip([*ours, dw, db], [*whole, dw_whole[part], db_whole[part]], strict=True):
        close(a, b, tolerance)
    same = torch.cat([t.double().flatten() for t in ours])
    other = [torch.empty_like(same) for _ in range(2)]
    dist.all_gather(other, same)
    assert torch.equal(*other)  # every rank the same bits
run(torch.float64, 1e-13)
run(torch.float64, 1e-13, softcap=3.0)
run(torch.float32, 2e-6)
run(torch.bfloat16, 1e-2)  # of the gradients: they are rounded to bfloat16, by each rank once
x = torch.ones(1, 8)
try:
    linear_logprob(x, torch.ones(5, 8), torch.tensor([10]), group=group)
    raise SystemExit("a target of no rank passed")
except ValueError as error:
    assert "exactly one rank" in str(error)
close(linear_logprob(x, torch.ones(5, 8), torch.tensor([9]), group=group), -torch.tensor([10.0]).log(), 1e-6)
dist.barrier()
dist.destroy_process_group()  # a process that ends with gloo's threads running may be aborted by them
"""


def test_vocabulary_over_two_processes(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", PARALLEL.format(rank=1, store=tmp_path / "store")],
                             stderr=subprocess.PIPE, text=True)
    try:
        exec(PARALLEL.format(rank=0, store=tmp_path / "store"), {})
    finally:
        errors = other.communicate(timeout=60)[1]
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert other.returncode == 0, errors


MEMORY = """
import resource, torch
from gradops.rl import linear_logprob
n, h, v = 1024, 16, 65536
dtype = torch.{dtype}
hidden, weight = torch.randn(n, h).to(dtype).requires_grad_(), torch.randn(v, h).to(dtype).requires_grad_()
targets = torch.randint(0, v, (n,))
def materialised(hidden, weight, targets):
    return torch.nn.functional.linear(hidden, weight).float().log_softmax(-1).gather(-1, targets[:, None])
run = {path}
run(hidden[:2], weight[:8], targets[:2] % 8).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(hidden, weight, targets).sum().backward()
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tenth_of_the_memory(dtype):
    ours, theirs = (int(subprocess.run([sys.executable, "-c", MEMORY.format(dtype=dtype, path=path)], check=True,
                                       capture_output=True, text=True).stdout)
                    for path in ("linear_logprob", "materialised"))
    assert ours < theirs / 10
