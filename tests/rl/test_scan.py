"""The scans against their references: discounted_returns, lambda_returns, gae, vtrace."""
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from gradops import rl
from gradops.rl import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Carries are float64 and results are rounded once; 16-bit input is exact in it.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-7, torch.bfloat16: 2e-7, torch.float16: 2e-7}
KINDS = ["discounted", "lambda", "gae", "vtrace"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(shape, kind, dtype=torch.float64, seed=0, flags=True, cu_seqlens=None, mask=True, device="cpu"):
    """Arguments of one of the functions; every option in some seed."""
    g = generator(seed)
    rows = shape[:-1] if cu_seqlens is None else (len(cu_seqlens) - 1,)

    def numbers(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(device, dtype)

    def bits(probability):
        return (torch.rand(shape, generator=g) < probability).to(device)

    args = {"rewards": numbers(*shape), "gamma": [0.97, 1.0, 0.5][seed % 3]}
    if kind != "discounted":
        args["lam"] = [0.9, 1.0, 0.0, 0.5][seed % 4]
    with_next = flags and seed % 2 == 1
    if kind in ("gae", "vtrace") or (kind == "lambda" and not with_next):
        args["values"] = numbers(*shape)
    if with_next:
        args |= {"next_values": numbers(*shape), "truncated": bits(0.2)}
    else:
        args["last_values"] = numbers(*rows)
    if flags:
        args["terminated"] = bits(0.1)
    if flags and mask:
        args["mask"] = bits(0.6)
    if kind == "vtrace":
        args |= {"log_ratios": numbers(*shape), "rho_clip": 1.5, "c_clip": [1.0, math.inf][seed % 2]}
    if cu_seqlens is not None:
        args["cu_seqlens"] = torch.as_tensor(cu_seqlens, device=device)
    return args


def function(kind, module=rl):
    return getattr(module, {"discounted": "discounted_returns", "lambda": "lambda_returns"}.get(kind, kind))


def call(kind, args, module=rl):
    out = function(kind, module)(**args)
    return list(out) if isinstance(out, tuple) else [out]


def raw(ops, kind, args):
    """The raw op behind a function, for backends that the public function does not reach."""
    get = args.get
    flags = [get("terminated"), get("truncated"), get("mask"), get("cu_seqlens")]
    if kind in ("discounted", "lambda"):
        return [ops.return_scan(get("rewards"), get("values"), get("next_values"), get("last_values"), *flags,
                                args["gamma"], get("lam", 1.0))]
    ratios = get("log_ratios")
    return list(ops.advantage_scan(get("rewards"), get("values"), get("next_values"), get("last_values"),
                                   None if ratios is None else ratios.exp(), *flags, args["gamma"], args["lam"],
                                   get("rho_clip", 1.0), get("c_clip", 1.0)))


def wide(args):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in args.items()}


def close(ours, want, dtype):
    for x, y in zip(ours, want, strict=True):
        assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scale = y.abs().amax() if y.numel() else 1
        torch.testing.assert_close(x.double(), y.double(), rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * float(scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed, shape", [(0, (3, 5)), (1, (2, 40)), (2, (1, 300)), (3, (5, 1)), (4, (2, 2, 33)),
                                         (5, (4, 32)), (6, (0, 7)), (7, (3, 0)), (8, (2, 700))])
def test_matches_float64(backend, kind, seed, shape):
    device, ops = backend
    for dtype in DTYPES if seed < 2 else DTYPES[:2]:
        for flags in (False, True):
            args = problem(shape, kind, dtype, seed, flags, device=device)
            if dtype not in DTYPES[:2] and kind == "vtrace":
                continue  # the ratios are made in float32 by the public function
            close(raw(ops, kind, args), call(kind, wide(args), reference), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed, cu_seqlens", [(0, [0, 5, 5, 45, 46, 300]), (1, [0, 0, 33, 40, 40]), (2, [0]),
                                              (3, [0, 0]), (4, [0, 600, 601])])
def test_packed(backend, kind, seed, cu_seqlens):
    device, ops = backend
    for flags in (False, True):
        args = problem((cu_seqlens[-1],), kind, seed=seed, flags=flags, cu_seqlens=cu_seqlens, device=device)
        close(raw(ops, kind, args), call(kind, args, reference), torch.float64)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 20), min_size=1, max_size=3), kind=st.sampled_from(KINDS),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), flags=st.booleans())
def test_any_shape(shape, kind, dtype, seed, flags):
    args = problem(tuple(shape), kind, dtype, seed, flags)
    close(call(kind, args), call(kind, wide(args), reference), dtype)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=0, max_size=6), kind=st.sampled_from(KINDS),
       seed=st.integers(0, 99), index=st.sampled_from([torch.int32, torch.int64]))
def test_any_lengths(lengths, kind, seed, index):
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths, dtype=int).tolist()], dtype=index)
    args = problem((int(cu_seqlens[-1]),), kind, seed=seed, cu_seqlens=cu_seqlens)
    close(call(kind, args), call(kind, args, reference), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_in_a_batch(backend, kind):
    device, ops = backend
    for seed, length in ((0, 20), (1, 70), (0, 600)):
        for flags in (False, True):
            args = problem((4, length), kind, torch.float32, seed, flags, device=device)
            batch = raw(ops, kind, args)
            for i in range(4):
                row = {k: v[i:i + 1] if isinstance(v, torch.Tensor) else v for k, v in args.items()}
                assert all(torch.equal(x[i:i + 1], y) for x, y in zip(batch, raw(ops, kind, row), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_the_same_alone_and_in_a_pack(backend, kind):
    device, ops = backend
    cu_seqlens = [0, 20, 90, 93, 700]
    for seed in (0, 1):
        args = problem((700,), kind, torch.float32, seed, cu_seqlens=cu_seqlens, device=device)
        batch = raw(ops, kind, args)
        for i, (b, e) in enumerate(pairwise(cu_seqlens)):
            row = {k: v[b:e] if isinstance(v, torch.Tensor) else v for k, v in args.items()}
            row["cu_seqlens"] = torch.tensor([0, e - b], device=device)
            if "last_values" in args:
                row["last_values"] = args["last_values"][i:i + 1]
            assert all(torch.equal(x[b:e], y) for x, y in zip(batch, raw(ops, kind, row), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cu_seqlens", [None, [0, 30000, 30010, 69999, 70000]])
def test_long_rows_do_not_depend_on_threads(kind, cu_seqlens):
    threads = torch.get_num_threads()
    for flags in (False, True):
        args = problem((1, 70000) if cu_seqlens is None else (70000,), kind, torch.float32, 0, flags, cu_seqlens)
        args |= {"gamma": 0.999}
        try:
            torch.set_num_threads(1)
            one = call(kind, args)
            torch.set_num_threads(4)
            assert all(torch.equal(x, y) for x, y in zip(one, call(kind, args), strict=True))
        finally:
            torch.set_num_threads(threads)
        if cu_seqlens is None:
            both = {k: torch.cat([v, v.flip(-1)]) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
            assert all(torch.equal(x[0], y[0]) for x, y in zip(one, call(kind, both), strict=True))


def filtered_gae(rewards, values, gamma, lam):
    r, v = rewards.double().numpy(), values.double().numpy()
    delta = r + gamma * np.append(v[:, 1:], np.zeros((len(v), 1)), 1) - v
    return torch.from_numpy(lfilter([1], [1, -gamma * lam], delta[:, ::-1])[:, ::-1].copy())


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.999, 0.95), (1.0, 0.95)])
def test_error_does_not_grow_with_length(gamma, lam):
    rewards, values = torch.rand(2, 2, 131072, generator=generator())
    want = filtered_gae(rewards, values, gamma, lam)
    for mask in (None, torch.ones_like(rewards, dtype=torch.bool)):
        advantages, returns = rl.gae(rewards, values, gamma=gamma, lam=lam, mask=mask)
        # one rounding to float32, far below the 1e-5 that a user may rely on
        torch.testing.assert_close(advantages.double(), want, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(returns.double(), want + values.double(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind, seed, cu_seqlens", [("gae", 0, None), ("vtrace", 1, [0, 10, 16500, 16500]),
                                                    ("lambda", 1, None), ("lambda", 2, [0, 16490, 16500])])
def test_chunks_on_cuda(cuda_backend, kind, seed, cu_seqlens):
    device, ops = cuda_backend
    args = problem((1, 16500) if cu_seqlens is None else (16500,), kind, seed=seed, cu_seqlens=cu_seqlens,
                   device=device) | {"gamma": 0.999}
    args["mask"][..., 6000:] &= torch.arange(16500, device=device)[6000:] < 7000  # a chunk without a token that counts
    args["mask"][..., -3000] = True
    on_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    close(raw(ops, kind, args), raw(torch.ops.gradops, kind, on_cpu), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_masked_tokens_are_as_if_they_were_not_there(backend, kind, seed):
    device, ops = backend
    args = problem((1, 600), kind, seed=seed, device=device)
    keep = args["mask"][0]
    for name in ("rewards", "values", "next_values"):
        if name in args:  # what is masked is not even read
            args[name][0, ~keep] = torch.nan
    masked = raw(ops, kind, args)
    rest = {k: v[:, keep] if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in args.items()}
    short = raw(ops, kind, rest | {"mask": None})
    for x, y in zip(masked, short, strict=True):
        assert (x[:, ~keep] == 0).all()
        torch.testing.assert_close(x[:, keep], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_episode(backend, kind):
    device, ops = backend
    for seed in (0, 1):
        args = problem((3, 200), kind, seed=seed, device=device, mask=False)
        args["terminated"][1, 100] = True
        before = raw(ops, kind, args)
        args["rewards"][1, 150] = torch.nan
        for x, y in zip(raw(ops, kind, args), before, strict=True):
            assert torch.equal(x[0], y[0]) and torch.equal(x[2], y[2]) and torch.equal(x[1, :101], y[1, :101])
            assert torch.equal(x[1, 151:], y[1, 151:]) and x[1, 150].isnan()


def test_strided_input(backend):
    device, ops = backend
    rewards, values = torch.randn(2, 40, 64, device=device, generator=generator())
    for view in (lambda x: x[::2], lambda x: x[:, ::2], lambda x: x.t(), lambda x: x[:1].expand(5, 64)):
        r, v = view(rewards), view(values)
        ours = raw(ops, "gae", {"rewards": r, "values": v, "gamma": 0.9, "lam": 0.9})
        want = raw(ops, "gae", {"rewards": r.clone(), "values": v.clone(), "gamma": 0.9, "lam": 0.9})
        assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=True))


def test_mixed_dtypes_are_promoted():
    args = problem((3, 20), "gae", seed=0)
    args["rewards"] = args["rewards"].bfloat16()
    args["values"] = args["values"].float()
    args["last_values"] = args["last_values"].half()
    close(call("gae", args), call("gae", wide(args), reference), torch.float32)


def test_the_functions_agree():
    args = problem((3, 50), "gae", seed=0)
    _, returns = rl.gae(**args)
    torch.testing.assert_close(returns, rl.lambda_returns(**args))
    no_ratio = rl.vtrace(**args, log_ratios=torch.zeros(3, 50, dtype=torch.float64))
    torch.testing.assert_close(returns, no_ratio[1])
    del args["values"], args["lam"]
    torch.testing.assert_close(rl.discounted_returns(**args), rl.lambda_returns(
        values=torch.randn(3, 50, dtype=torch.float64), lam=1.0, **args))


def differentiable(args):
    names = [k for k in ("rewards", "values", "next_values", "last_values") if k in args]
    rest = {k: v for k, v in args.items() if k not in names}
    return names, rest, tuple(args[k].clone().requires_grad_() for k in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 3, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives(kind, seed, packed):
    cu_seqlens = [0, 2, 2, 7] if packed else None
    args = problem((7,) if packed else (2, 5), kind, seed=seed, cu_seqlens=cu_seqlens)
    names, rest, inputs = differentiable(args)

    def f(*xs):
        out = function(kind)(**dict(zip(names, xs, strict=True)), **rest)
        return out if isinstance(out, tuple) else (out,)

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=not packed)
    assert torch.autograd.gradgradcheck(f, inputs)
    if not packed:  # vmap has no packed form
        ours = torch.func.jacrev(f, argnums=tuple(range(len(names))))(*(x.detach() for x in inputs))
        want = torch.autograd.functional.jacobian(
            lambda *xs: tuple(call(kind, dict(zip(names, xs, strict=True)) | rest, reference)), inputs)
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(list(a), list(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_other_dtypes(dtype):
    args = problem((3, 40), "gae", dtype, seed=0)
    _, rest, inputs = differentiable(args)
    grads = torch.autograd.grad(sum(x.sum() for x in rl.gae(*inputs[:2], last_values=inputs[2], **rest)), inputs)
    twins = [x.detach().double().requires_grad_() for x in inputs]
    want = torch.autograd.grad(sum(x.sum() for x in reference.gae(*twins[:2], last_values=twins[2], **rest)), twins)
    for x, y in zip(grads, want, strict=True):
        assert x.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def test_carry_scan(backend):
    device, ops = backend
    x, a = torch.randn(2, 3, 700, dtype=torch.float64, generator=generator()).to(device)
    a = torch.where(a > 1, 0, a.sigmoid())
    before, last = ops.carry_scan(x, a, None)
    carry = torch.zeros(3, dtype=torch.float64, device=device)
    for t in range(700):
        torch.testing.assert_close(before[:, t], carry)
        carry = x[:, t] + a[:, t] * carry
    torch.testing.assert_close(last, carry)
    cu_seqlens = torch.arange(4, device=device) * 700
    packed = ops.carry_scan(x.flatten(), a.flatten(), cu_seqlens)
    torch.testing.assert_close(packed, (before.flatten(), last))


def test_wrong_offsets_are_an_error():
    for bad in ([0, 5, 3, 10], [1, 10], [0, 9], [0, 11]):
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 10, got \d+ at index [0-2]"):
            rl.gae(torch.ones(10), torch.ones(10), gamma=0.9, lam=0.9, cu_seqlens=torch.tensor(bad))


def test_a_ratio_asking_for_a_derivative_is_refused():
    args = problem((2, 5), "vtrace")
    args["log_ratios"].requires_grad_()
    with pytest.raises(RuntimeError, match="log_ratios asks for a derivative"):
        rl.vtrace(**args)


def test_bad_input():
    x = torch.ones(2, 5)
    good = {"rewards": x, "values": x, "gamma": 0.9, "lam": 0.9}
    for change, error, message in [
        ({"rewards": [1.0]}, TypeError, "rewards must be a torch.Tensor, got list"),
        ({"rewards": x.long()}, TypeError, "rewards must be float64"),
        ({"rewards": torch.tensor(1.0)}, ValueError, "rewards must have at least 1 dimension"),
        ({"values": x[0]}, ValueError, r"values must have the shape of rewards, \(2, 5\), got \(5,\)"),
        ({"mask": x}, TypeError, "mask must be bool, got torch.float32"),
        ({"terminated": x[:, :3] > 0}, ValueError, "terminated must have the shape of rewards"),
        ({"truncated": x > 0}, ValueError, "truncated needs next_values"),
        ({"last_values": x}, ValueError, r"last_values must have shape \(2,\)"),
        ({"last_values": x[:, 0], "next_values": x}, ValueError, "last_values or next_values, not both"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"rewards must have shape \(N,\) with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0])}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": torch.tensor(0)}, ValueError, r"cu_seqlens must have shape \(sequences \+ 1,\)"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({"lam": float("nan")}, ValueError, r"lam must be in \[0, 1\], got nan"),
    ]:
        with pytest.raises(error, match=message):
            rl.gae(**(good | change))
    with pytest.raises(ValueError, match="one of values and next_values"):
        rl.lambda_returns(x, gamma=0.9, lam=0.9)
    with pytest.raises(ValueError, match="rho_clip must not be negative"):
        rl.vtrace(**good, log_ratios=x, rho_clip=-1.0)
    with pytest.raises(TypeError, match="log_ratios must be a torch.Tensor, got"):
        rl.vtrace(**good, log_ratios=None)
