"""The kernels of one block, on the CPU, on a GPU and emulated."""
import pytest
import torch

from gradops.quant import reference

from .test_gptq_quantize import problem, upper

PLAIN = {"bits": 4, "sym": True, "authors": False, "mse": 0.0, "grid": 0, "scale_type": 0, "beta": 0.0,
         "pull_first": False, "latent_rounded": False}  # fmt: skip


def run(backend, w, u=None, original=None, pull=None, scale=None, zero=None, group=None, unit=None, group_size=16,
        **options):  # fmt: skip
    device, ops = backend
    tensors = (None if t is None else t.to(device) for t in (w, u, original, pull, scale, zero, group, unit))
    return [t.cpu() for t in ops.gptq_block(*tensors, group_size, *(PLAIN | options).values())]


@pytest.mark.parametrize("options", [{}, {"sym": False, "bits": 3}, {"mse": 2.4, "bits": 2}, {"mse": 2.0},
                                     {"scale_type": 1}, {"scale_type": 2},
                                     {"group_size": 40}, {"group_size": 11}], ids=str)  # fmt: skip
def test_gptq(backend, options):
    W, H, _ = problem(2, rows=5, n=40)
    U = upper(H).float()
    codes, q, e, latent, scale, zero, loss = run(backend, W, U, **options)
    names = {"scale_type": "scale_dtype"}
    public = {names.get(k, k): (torch.float32, torch.float16, torch.bfloat16)[v] if k in names else v
              for k, v in {"group_size": 16, **options}.items()}
    exact = reference.gptq_quantize(W.double(), H, factor=U.double(), **public)
    same = (codes == exact.codes).all(-1)
    assert same.double().mean() >= 0.9
    torch.testing.assert_close(scale[same].double(), exact.scales[same], rtol=1e-5, atol=0)
    assert torch.equal(zero[same].double(), exact.zeros[same])
    torch.testing.assert_close(loss[same].double(), exact.loss[same], rtol=1e-4, atol=0)
    torch.testing.assert_close(q[same].double(), exact.weight[same], rtol=1e-5, atol=1e-9)
    assert latent.numel() == 0 and e.shape == W.shape


@pytest.mark.parametrize("foem, pull, authors", [(True, False, False), (False, True, False), (True, True, False),
                                                 (True, True, True)])  # fmt: skip
def test_foem_and_gptaq(backend, foem, pull, authors):
    W, H, D = problem(2, rows=5, n=72)
    U = upper(H).float()
    P = 0.25 * (D @ U.double().mT).triu(1) @ U.double()
    original = W + 0.001 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    codes, q, e, latent, *_ = run(backend, W, U, original if foem else None, P.float() if pull else None,
                                        beta=0.2, pull_first=authors, latent_rounded=authors, group_size=24)
    # The definition, a column at a time.
    w, u, beta = W.double(), U.double(), 0.2 if foem else 0.0
    p = P.float().double() if pull else torch.zeros_like(P)
    scale, zero = run(backend, W, U, original if foem else None, P.float() if pull else None, beta=0.2,
                      pull_first=authors, group_size=24)[4:6]
    for j in range(W.shape[-1]):
        if foem and (j > 0 or authors):
            w[..., j] -= beta * (w[..., j] - original[..., j])
        now, s, z = w[..., j].clone(), scale[..., j // 24].double(), zero[..., j // 24].double()
        code = codes[..., j].double()
        assert ((now / s - (code - z)).abs()[(code > 0) & (code < 15)] <= 0.5 + 1e-4).all()
        torch.testing.assert_close(q[..., j].double(), s * (code - z), rtol=1e-6, atol=0)
        moved = now - q[..., j].double() - beta * (now - original[..., j])
        torch.testing.assert_close(e[..., j].double(), moved / u[:, j, j, None], rtol=1e-3, atol=1e-5)
        if pull:
            want = now - moved if authors else now
            torch.testing.assert_close(latent[..., j].double(), want, rtol=1e-4, atol=1e-6)
        w[..., j:] -= (moved / u[:, j, j, None])[..., None] * u[:, None, j, j:] - now[..., None] * p[:, None, j, j:]


def test_given_scales_and_groups_in_any_order(backend):
    W, _, _ = problem(2, rows=5, n=40)
    scale, zero = run(backend, W)[4:6]
    group = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) // 16 for i in range(2)])
    codes, q, _, _, none, _, _ = run(backend, W, torch.eye(40).expand(2, 40, 40), None, None, scale, zero, group)
    where = group[:, None].expand(W.shape)
    s, z = scale.take_along_dim(where, -1), zero.take_along_dim(where, -1)
    assert none.numel() == 0
    assert torch.equal(codes, (torch.round(W / s) + z).clamp(0, 15).to(torch.uint8))
    assert torch.equal(codes, run(backend, W, None, None, None, scale, zero, group)[0])
    assert torch.equal(q, s * (codes - z))


@pytest.mark.parametrize("grid, group_size", [(1, 16), (2, 32)])
def test_fp4(backend, grid, group_size):
    W, H, _ = problem(2, rows=5, n=72)
    unit = (W.abs().flatten(1).amax(-1) / 2688) if grid == 1 else None
    codes, q, *_ = run(backend, W, unit=unit, grid=grid, group_size=group_size)
    exact = reference.rtn_quantize(W, grid=(None, "nvfp4", "mxfp4")[grid], group_size=group_size)
    assert torch.equal(codes, exact.codes)
    torch.testing.assert_close(q, exact.weight, rtol=1e-6, atol=0)
    moved = run(backend, W, upper(H).float(), unit=unit, grid=grid, group_size=group_size)
    assert moved[2].isfinite().all() and not torch.equal(moved[0], codes)


def test_rows_and_items_stand_alone(backend):
    W, H, _ = problem(2, rows=19, n=40)
    U = upper(H).float()
    all_rows = run(backend, W, U)
    for part in (slice(0, 1), slice(7, 19)):
        for a, b in zip(all_rows, run(backend, W[1:, part], U[1:]), strict=True):
            assert torch.equal(a[1:, part], b)
    W[1, 3, 5] = torch.nan
    for a, b in zip(all_rows, run(backend, W, U), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, 4:], b[1, 4:])


def test_views_and_empty(backend):
    W, H, _ = problem(2, rows=5, n=64)
    U = upper(H).float()
    view = run(backend, W[..., 20:40], U[..., 20:40, 20:40])
    copy = run(backend, W[..., 20:40].clone(), U[..., 20:40, 20:40].clone())
    assert all(torch.equal(a, b) for a, b in zip(view, copy, strict=True))
    for shape in ((0, 3, 8), (2, 0, 8)):
        assert run(backend, torch.zeros(shape), torch.eye(8).expand(shape[0], 8, 8))[0].shape == shape


def test_bad_input_is_refused():
    ops, W = torch.ops.gradops, torch.randn(2, 3, 8)
    one = torch.ones(2, 3, 1)
    for message, arguments in {
        "u has the wrong shape": {"u": torch.eye(8)},
        "w has the wrong dtype": {"w": W.double()},
        "more than 128 columns": {"w": torch.randn(2, 3, 129), "u": torch.eye(129).expand(2, 129, 129)},
        "go with u": {"original": W},
        "go together": {"scale": one},
        "group must be in": {"scale": one, "zero": one, "group": torch.ones(2, 8, dtype=torch.int64)},
        "group_size": {"group_size": 0},
        "bits": {"bits": 9},
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            run(("cpu", ops), **{"w": W} | arguments)


def test_results_go_where_they_belong(backend):
    device, ops = backend
    W, H, _ = problem(2, rows=5, n=40)
    U = upper(H).float()
    want = run(backend, W, U)
    wide = [torch.zeros(*W.shape[:-1], 64, dtype=t.dtype, device=device) for t in want[:6]]
    parts = [x[..., 7 : 7 + t.shape[-1]] for x, t in zip(wide, want, strict=False)]
    loss = torch.zeros(W.shape[:-1], device=device)
    codes, q, e, _, scales, zeros = parts
    inputs = W.to(device), U.to(device), *(None,) * 6, 16, *PLAIN.values()
    ops.gptq_block_(codes, q, e, None, scales, zeros, loss, *inputs)
    for x, part, t in zip(wide, parts, want, strict=False):
        assert torch.equal(part.cpu(), t) and x.count_nonzero() == part.count_nonzero()
    assert torch.equal(loss.cpu(), want[6])
    ops.gptq_block_(codes.zero_(), q, None, None, scales, zeros, loss, *inputs)  # E is not wanted
    assert torch.equal(codes.cpu(), want[0])
    with pytest.raises(RuntimeError, match="side by side"):
        ops.gptq_block_(codes, q.mT.contiguous().mT, e, None, scales, zeros, loss, *inputs)
