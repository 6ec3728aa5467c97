import copy
import io

import pytest
import torch

from gradops.quant import QuantizedLinear, gptq_quantize, rtn_quantize

from .test_gptq_quantize import problem


def layer(bits=4, bias=True, dtype=None, **more):
    W, H, _ = problem(2, rows=24, n=96)
    q = gptq_quantize(W[0], H[0], bits=bits, group_size=32, desc_act=True, scale_dtype=torch.float16)
    b = torch.randn(24, generator=torch.Generator().manual_seed(0)) if bias else None
    return q, QuantizedLinear.from_quantized(q, b, bits=bits, group_size=32, **more)


@pytest.mark.parametrize("bits, checkpoint_format", [(2, "gptq"), (3, "gptq_v2"), (4, "gptq"), (8, "gptq_v2")])
def test_forward_and_state_dict(bits, checkpoint_format):
    q, ours = layer(bits, checkpoint_format=checkpoint_format)
    x = torch.randn(2, 3, 96)
    assert torch.equal(ours.dequantize(), q.weight) and torch.equal(ours.weight, q.weight.to(ours.scales.dtype))
    torch.testing.assert_close(ours(x), torch.nn.functional.linear(x, q.weight, ours.bias), atol=1e-5, rtol=1e-5)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    new = QuantizedLinear(96, 24, bits=bits, group_size=32, checkpoint_format=checkpoint_format, dtype=torch.float16)
    assert list(new.state_dict()) == ["qweight", "qzeros", "scales", "g_idx", "bias"]
    new.load_state_dict(torch.load(file))
    ours.bias = ours.bias.half()
    assert torch.equal(new(x), ours(x)) and torch.equal(copy.deepcopy(new)(x), ours(x))


def test_without_bias_and_in_other_dtypes():
    q, ours = layer(bias=False)
    assert ours.bias is None and "bias" not in ours.state_dict()
    x = torch.randn(5, 96)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = ours.to(dtype)(x.to(dtype))
        assert y.dtype == dtype and (y - x @ q.weight.T).norm() < 2e-2 * y.norm()
    assert "bias=False, bits=4, group_size=32)" in repr(ours)


def test_derivatives_reach_adapters():
    _, ours = layer()
    down = torch.nn.Linear(24, 4)
    x = torch.randn(3, 96, requires_grad=True)
    down(ours(x)).square().sum().backward()
    grad = x.grad.clone()
    dense = torch.nn.functional.linear(x, ours.dequantize(), ours.bias)
    want, = torch.autograd.grad(down(dense).square().sum(), x)
    torch.testing.assert_close(grad, want, atol=1e-4, rtol=1e-4)
    assert not list(ours.parameters())


@pytest.mark.slow
def test_compile():
    _, ours = layer()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 40):
        x = torch.randn(rows, 96, requires_grad=True)
        torch.testing.assert_close(compiled(x), ours(x))
        got, = torch.autograd.grad(compiled(x).square().sum(), x)
        want, = torch.autograd.grad(ours(x).square().sum(), x)
        torch.testing.assert_close(got, want)


def test_one_group_and_a_group_that_is_not_full():
    for group_size in (-1, 40):
        q = rtn_quantize(torch.randn(8, 96), group_size=group_size, scale_dtype=torch.float16)
        ours = QuantizedLinear.from_quantized(q, bits=4, group_size=group_size)
        empty = QuantizedLinear(96, 8, False, bits=4, group_size=group_size)
        assert all(getattr(empty, n).shape == t.shape and getattr(empty, n).dtype == t.dtype
                   for n, t in ours.state_dict().items())
        assert torch.equal(empty.g_idx, ours.g_idx)
        x = torch.randn(3, 96)
        torch.testing.assert_close(ours(x), x @ q.weight.T, atol=1e-5, rtol=1e-5)


def test_bad_input():
    q, _ = layer()
    for message, call in (
        ("bits must be one of", lambda: QuantizedLinear(96, 24, bits=5, group_size=32)),
        ("group_size must be positive", lambda: QuantizedLinear(96, 24, bits=4, group_size=0)),
        ("must be positive, got 0 and 24", lambda: QuantizedLinear(0, 24, bits=4, group_size=32)),
        ("q.scales must have shape", lambda: QuantizedLinear.from_quantized(q, bits=4, group_size=48)),
        (r"bias must have shape \(24,\)", lambda: QuantizedLinear.from_quantized(
            q, torch.ones(3), bits=4, group_size=32)),
        (r"q.codes must have shape \(out, in\)", lambda: QuantizedLinear.from_quantized(
            rtn_quantize(torch.randn(2, 8, 96), group_size=32), bits=4, group_size=32)),
        ("checkpoint_format must be", lambda: QuantizedLinear(96, 24, bits=4, group_size=32, checkpoint_format="awq")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="q must be a QuantizedWeight"):
        QuantizedLinear.from_quantized(torch.ones(3), bits=4, group_size=32)
