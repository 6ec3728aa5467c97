import pytest
import torch

from gradops.quant import pack_fp4, reference, rtn_quantize, unpack_fp4


@pytest.mark.parametrize("shape", [(1, 2), (3, 6), (2, 5, 34), (0, 4), (3, 0), (2, 64)])
def test_bytes_equal_the_reference_and_come_back(shape):
    codes = torch.randint(16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_fp4(codes)
    assert packed.is_contiguous() and torch.equal(packed, reference.pack_fp4(codes))
    assert torch.equal(unpack_fp4(packed), codes) and torch.equal(reference.unpack_fp4(packed), codes)
    assert torch.equal(pack_fp4(codes.mT.contiguous().mT), packed)


def test_a_quantised_weight():
    q = rtn_quantize(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), grid="nvfp4", group_size=16)
    assert torch.equal(unpack_fp4(pack_fp4(q.codes)), q.codes)


def test_bad_input():
    with pytest.raises(TypeError, match="codes must be uint8, got torch.int32"):
        pack_fp4(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="even number of columns, got 3"):
        pack_fp4(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="packed must have at least 2 dimensions, got 1"):
        unpack_fp4(torch.zeros(3, dtype=torch.uint8))
