"""A linear layer in GPTQ's packed form against dense layers, and against unpacking before the product."""
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import quant

from ..harness import Case, Settings, relative_error

BITS, GROUP = 4, 128


def torch_unpacked(tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(out, in), as people write it: shifts, then scales by group."""
    shifts = torch.arange(0, 32, BITS, device=tensors["qweight"].device, dtype=torch.int32)
    codes = (tensors["qweight"][:, None] >> shifts[:, None] & 15).flatten(0, 1)
    zeros = (tensors["qzeros"][:, :, None] >> shifts & 15).flatten(1) + 1
    where = tensors["g_idx"]
    return ((codes - zeros[where]).to(dtype) * tensors["scales"].to(dtype)[where]).mT


def int4pack(tensors: dict[str, Tensor], W: Tensor, settings: Settings) -> Any:
    """torch's own layer of 4 bits: zero points in units of the weight, scales and points in bfloat16."""
    if settings.device != "cpu":
        return None
    scales = tensors["scales"].float()
    codes = (W.mT / scales.repeat_interleave(GROUP, 0)).round().int() + 8  # symmetric: the zero point is 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.mT.contiguous(), 1)
    both = torch.stack([scales, torch.zeros_like(scales)], -1).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, both)


def cases(settings: Settings) -> Iterator[Case]:
    for out, n in ((256, 512),) if settings.quick else ((4096, 4096), (11008, 4096)):
        yield from layer(out, n, settings)


def layer(out: int, n: int, settings: Settings) -> Iterator[Case]:
    g = torch.Generator().manual_seed(0)
    q = quant.rtn_quantize(torch.randn(out, n, generator=g), group_size=GROUP, scale_dtype=torch.float16)
    tensors = {name: t.to(settings.device) for name, t in quant.pack_gptq(q, bits=BITS).items()}
    W = q.weight.to(settings.device)
    own = int4pack(tensors, W, settings)
    size = float(sum(t.nbytes for t in tensors.values()))
    for dtype in (torch.float32, torch.bfloat16):
        dense = W.to(dtype)
        for rows in (1, 4, 8, 64):
            x = torch.randn(rows, n, generator=g).to(settings.device, dtype)
            peers = {"dense weight": lambda x=x, w=dense: torch.nn.functional.linear(x, w)}
            if own and dtype == torch.bfloat16:  # with other types it takes a hundred times as long
                peers["torch int4pack"] = lambda x=x: own(x)
            yield Case(
                "dequant_linear", f"{rows}x{n}->{out}", dtype, variant=f"{BITS} bits",
                ours=lambda x=x: quant.dequant_linear(x, **tensors, bits=BITS),
                reference=lambda x=x, d=dtype: torch.nn.functional.linear(x, torch_unpacked(tensors, d)),
                peers=peers,
                error=relative_error(lambda x=x: x.double() @ W.double().mT),
                flops={dtype: 2.0 * rows * n * out}, bytes=size, reads=True,
            )  # fmt: skip
