import pytest
import torch

from gradops.curvature import reference, rope

from .second_order import check_second_order

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-15, torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def tables(tokens, pairs, dtype=torch.float64, device="cpu"):
    angles = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(pairs, dtype=torch.float64)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def numbers(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, pairs", [((2, 3, 5, 70), 35), ((4, 9), 2), ((2, 0, 6), 3), ((3, 2, 2), 1)])
def test_matches_float64(backend, shape, pairs, dtype, interleaved):
    device, ops = backend
    x = numbers(*shape, dtype=dtype, device=device)
    for kind in {dtype, torch.promote_types(dtype, torch.float32)}:
        cos, sin = (t.expand(*shape[:-1], pairs) for t in tables(shape[-2], pairs, kind, device))
        y = ops.rope(x, cos, sin, interleaved, False)
        want = reference.rope(x.double(), cos.double(), sin.double(), interleaved=interleaved, rotary_dim=2 * pairs)
        assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
        torch.testing.assert_close(y.double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        if dtype.itemsize > 2:
            back = ops.rope(y, cos, sin, interleaved, True)
            torch.testing.assert_close(back, x, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])


@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_of_every_form(interleaved):
    x = numbers(2, 3, 5, 8, dtype=torch.float32)
    cos, sin = tables(5, 2, torch.float32)
    want = reference.rope(x, cos, sin, interleaved=interleaved, rotary_dim=4)
    whole = [t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin)]
    for c, s in ((cos, sin), whole, [t.expand(2, 1, 5, 4) for t in whole], [t.T.contiguous().T for t in whole],
                 (cos.double(), sin.double())):
        torch.testing.assert_close(rope(x, c, s, interleaved=interleaved, rotary_dim=4), want)
    with pytest.raises(ValueError, match="rotary_dim / 2 = 4 or rotary_dim = 8"):
        rope(x, cos, sin)  # a half of 4, or a whole of 2 twice? rotary_dim says so


def test_strides_are_read_in_place(backend):
    device, ops = backend
    x = numbers(2, 5, 3, 8, dtype=torch.float32, device=device)
    views = x.transpose(1, 2), x[:, ::2, :2].transpose(1, 2), x.permute(2, 0, 3, 1), x[..., :4], x[:1, :, 1:].expand(3, 5, 2, 8)
    for view in views:
        cos, sin = tables(view.shape[-2], 2, torch.float32, device)
        args = [t.expand(*view.shape[:-1], 2) for t in (cos, sin)]
        assert torch.equal(ops.rope(view, *args, True, False), ops.rope(view.clone(), *(t.clone() for t in args), True, False))


def test_a_nan_stays_in_its_pair(backend):
    device, ops = backend
    x = numbers(3, 6, dtype=torch.float32, device=device)
    x[1, 1] = torch.nan
    y = ops.rope(x, *tables(3, 3, torch.float32, device), False, False)
    assert y.isnan().nonzero().tolist() == [[1, 1], [1, 4]]


@pytest.mark.parametrize("interleaved", [False, True])
def test_both_orders(interleaved):
    cos, sin = tables(2, 1)
    x = numbers(2, 2, 3)
    check_second_order(*((lambda x, f=f: f(x, cos, sin, interleaved=interleaved, rotary_dim=2))
                         for f in (rope, reference.rope)), [x])
    batch = torch.stack([cos, sin])
    ours, want = (torch.vmap(lambda x, c, f=f: f(x, c, c.roll(1), rotary_dim=2), (None, 0))(x, batch)
                  for f in (rope, reference.rope))
    torch.testing.assert_close(ours, want)


def test_no_derivative_in_the_tables():
    x, (cos, sin) = numbers(2, 4), tables(2, 2)
    with pytest.raises(RuntimeError, match="rope: sin asks for a derivative"):
        rope(x, cos, sin.requires_grad_())
    with pytest.raises(RuntimeError, match="rope: cos asks for a derivative"):
        torch.func.jvp(lambda c: rope(x, c, sin.detach()), (cos,), (cos,))


def test_wrong_input():
    x, (cos, sin) = numbers(2, 4), tables(2, 2)
    with pytest.raises(ValueError, match=r"x must have at least 2 dimensions"):
        rope(x[0], cos, sin)
    with pytest.raises(ValueError, match="rotary_dim must be even and at most 4, the last size of x, got 6"):
        rope(x, cos, sin, rotary_dim=6)
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        rope(x[:, :3], cos, sin)
    with pytest.raises(ValueError, match=r"sin must broadcast to the shape of x but for the last dimension, \(2,\)"):
        rope(x, cos, sin[:, None])
    with pytest.raises(TypeError, match="cos must be float64, float32, bfloat16 or float16, got torch.int64"):
        rope(x, cos.long(), sin)
