"""The two sweeps of HARPG and NPGIGT over a list of tensors, against float64."""
import pytest
import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(), (3, 5), (0, 4), (1100,), (2, 130, 129)]  # the last has three chunks
ETA = [0.3, 1.0, 0.25, 0.5, 0.9]
SIGN = [1.0, -1.0, 1.0, -1.0, 1.0]


def numbers(seed, dtype, device):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=random).to(device, dtype) for s in SHAPES]


def close(ours, want, dtype):
    for y, w in zip(ours, want, strict=True):
        torch.testing.assert_close(y.double(), w, rtol=ROUNDING[dtype], atol=4 * min(ROUNDING[dtype], 3e-7))


@pytest.mark.parametrize("dtype, other", [*((t, t) for t in DTYPES), (torch.float32, torch.bfloat16),
                                          (torch.float32, torch.float64), (torch.float64, torch.float16)])
def test_matches_float64(backend, dtype, other):
    device, ops = backend
    d, grad, change, params = (numbers(i, t, device) for i, t in enumerate((dtype, other, other, other)))
    for corrected in (True, False):
        new = [x.clone() for x in d]
        norm = ops.harpg_update_(new, change if corrected else [], grad, ETA, SIGN)
        want = [(1 - e) * (x.double() + s * c.double() * corrected) + e * s * g.double()
                for x, c, g, e, s in zip(d, change, grad, ETA, SIGN, strict=True)]
        close(new, want, dtype)
        together = torch.cat([w.flatten() for w in want]).norm()
        torch.testing.assert_close(norm, together, rtol=10 * ROUNDING[dtype], atol=0)
    for lr, tensor, division in ((0.7, None, None), (1.0, torch.tensor(0.7, dtype=torch.float64, device=device), norm),
                                 (0.7, None, 0 * norm)):
        moved, scale = [p.clone() for p in params], [x.new_zeros(()) for x in d]
        ops.harpg_apply_(moved, d, scale, lr, tensor, division)
        c = 0.7 if division is None else 0.7 / division.item() if division else 0
        assert all(abs(s.item() - c) <= ROUNDING[dtype] * c for s, x in zip(scale, d, strict=True) if x.numel())
        close(moved, [p.double() - s.double() * x.double() for p, x, s in zip(params, d, scale, strict=True)], other)


def test_where_eta_is_1_nothing_old_is_read(backend):
    device, ops = backend
    d, bad = (torch.full((4,), torch.nan, device=device) for _ in range(2))
    grad = torch.arange(4.0, device=device)
    assert ops.harpg_update_([d], [bad], [grad], [1.0], [-1.0]) == grad.double().norm()
    assert torch.equal(d, -grad)


def test_layouts(backend):
    device, ops = backend
    x = torch.randn(4, 6, 5, device=device).permute(2, 0, 1)
    d, grad, change = x.clone(), x + 1, x.sin()
    assert d.stride() == grad.stride() == x.stride()
    norm = ops.harpg_update_([d], [change], [grad], [0.3], [1.0])
    want = 0.7 * (x + change) + 0.3 * grad
    torch.testing.assert_close(d, want)
    torch.testing.assert_close(norm.float(), want.norm())
    before, scale = d.clone(), d.new_zeros(())
    ops.harpg_update_([d], [change.contiguous()], [grad.contiguous().bfloat16()], [0.5], [1.0])
    torch.testing.assert_close(d, 0.5 * (before + change) + 0.5 * grad.bfloat16())
    wide = torch.ones(5, 4, 12, device=device)
    ops.harpg_apply_([wide[..., ::2]], [d], [scale], 0.1, None, None)
    torch.testing.assert_close(wide[..., ::2], 1 - 0.1 * d)
    assert (wide[..., 1::2] == 1).all()
    with pytest.raises(RuntimeError, match="grad must have the shapes of d"):
        ops.harpg_update_([d], [], [grad[1:]], [0.3], [1.0])
    with pytest.raises(RuntimeError, match="d must be dense"):
        ops.harpg_update_([d[:, ::2]], [], [grad[:, ::2]], [0.3], [1.0])


def test_more_tensors_than_a_launch_takes(backend):
    device, ops = backend
    d = [torch.full((n % 7,), float(n), device=device) for n in range(70)]
    grad = [torch.ones_like(x) for x in d]
    want = [0.5 * x + 0.5 for x in d]
    norm = ops.harpg_update_(d, [], grad, [0.5] * 70, [1.0] * 70)
    assert all(map(torch.equal, d, want))
    torch.testing.assert_close(norm, torch.cat(want).double().norm())
    params = [x.clone() for x in d]
    ops.harpg_apply_(params, d, [x.new_zeros(()) for x in d], 1.0, None, None)
    assert not torch.cat(params).any()
