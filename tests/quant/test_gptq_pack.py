import pytest
import torch

from gradops.quant import QuantizedWeight, gptq_quantize, pack_gptq, reference, rtn_quantize, unpack_gptq

from .test_gptq_quantize import problem

BITS = [2, 3, 4, 8]


def some_codes(*shape, bits):
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(2, 20, 64), (1, 1), (17, 45), (3, 0), (0, 4), (2, 0, 3), (33, 7)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_and_back(backend, bits, shape, transposed):
    device, ops = backend
    codes = some_codes(*shape, bits=bits)
    words = ops.gptq_pack(codes.to(device), bits, transposed)
    want = reference.pack._to_words(codes, bits)
    assert torch.equal(words.cpu(), want.mT if transposed else want)
    assert torch.equal(ops.gptq_unpack(words, bits, shape[-1], transposed).cpu(), codes)


def test_codes_with_too_many_bits_do_not_touch_their_neighbours(backend):
    device, ops = backend
    codes = torch.full((1, 32), 255, dtype=torch.uint8)
    for bits in BITS:
        assert (ops.gptq_pack(codes.to(device), bits, False) == -1).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_a_checkpoint_stands_for_the_same_weight(bits, checkpoint_format):
    W, H, _ = problem(2, rows=24, n=96)
    q = gptq_quantize(W, H, bits=bits, group_size=32, desc_act=True, scale_dtype=torch.float16)
    tensors = pack_gptq(q, bits=bits, checkpoint_format=checkpoint_format)
    want = reference.pack_gptq(q, bits=bits, checkpoint_format=checkpoint_format)
    assert all(torch.equal(tensors[name], want[name]) for name in want)
    back = unpack_gptq(tensors, bits=bits, checkpoint_format=checkpoint_format)
    exact = reference.unpack_gptq(tensors, bits=bits, checkpoint_format=checkpoint_format)
    assert all(torch.equal(a, b) for a, b in zip(back, exact, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(back[:5], q[:5], strict=True))


def test_layout_of_three_bits():
    """32 values in 3 words, the 11th and the 22nd across two: what readers of the format expect."""
    codes = some_codes(1, 32, bits=3)
    v = codes[0].tolist()
    first = sum(v[j] << (3 * j) for j in range(10)) | (v[10] & 3) << 30
    second = v[10] >> 2 | sum(v[11 + j] << (3 * j + 1) for j in range(10)) | (v[21] & 1) << 31
    third = v[21] >> 1 | sum(v[22 + j] << (3 * j + 2) for j in range(10))
    words = torch.ops.gradops.gptq_pack(codes, 3, False)[0].tolist()
    assert [w % 2**32 for w in words] == [first, second, third]


def test_what_cannot_be_stored_is_refused():
    q = rtn_quantize(torch.rand(8, 64) + 0.5, group_size=32, sym=False)
    assert (q.zeros == 0).all()
    with pytest.raises(ValueError, match="zeros must be 1 to 16"):
        pack_gptq(q, bits=4)
    assert torch.equal(unpack_gptq(pack_gptq(q, bits=4, checkpoint_format="gptq_v2"), bits=4,
                                   checkpoint_format="gptq_v2").zeros, q.zeros)  # fmt: skip
    with pytest.raises(ValueError, match="scales must be positive"):
        pack_gptq(rtn_quantize(torch.randn(8, 64) * 1e-8), bits=4)
    with pytest.raises(ValueError, match="codes must be at most 3 with bits=2"):
        pack_gptq(rtn_quantize(torch.randn(8, 64)), bits=2)
    with pytest.raises(ValueError, match="bits must be one of"):
        pack_gptq(q, bits=5)
    with pytest.raises(TypeError, match="q must be a QuantizedWeight"):
        pack_gptq({}, bits=4)
    with pytest.raises(ValueError, match="checkpoint_format must be one of"):
        pack_gptq(q, bits=4, checkpoint_format="awq")


def test_a_broken_checkpoint_is_refused():
    tensors = pack_gptq(rtn_quantize(torch.randn(8, 64), group_size=32), bits=4)
    for error, message, change in (
        (ValueError, "tensors must hold 'g_idx'", {"g_idx": None}),
        (ValueError, "g_idx must be 0 to 1, got 0 to 2", {"g_idx": tensors["g_idx"] * 2}),
        (ValueError, r"qweight must end in \(8, 8\)", {"qweight": tensors["qweight"][:7]}),
        (TypeError, "qzeros must be int32", {"qzeros": tensors["qzeros"].long()}),
    ):
        broken = {k: v for k, v in (tensors | change).items() if v is not None}
        with pytest.raises(error, match=message):
            unpack_gptq(broken, bits=4)
    assert isinstance(unpack_gptq(tensors, bits=4), QuantizedWeight)
