import torch

from gradops import quant

from . import Call


def hessian(x):
    n = x.shape[-1]
    places = torch.arange(n, dtype=torch.float64)
    return 0.5 ** (places[:, None] - places).abs()


def block(x):
    factor = torch.linalg.inv(torch.linalg.cholesky(hessian(x).flip(-2, -1))).flip(-2, -1).float()
    return (x.float(), factor.expand(*x.shape[:-2], *factor.shape), None, None, None, None, None, None, 4, 4, True,
            False, 0.0, 0, 0, 0.0, False, False)  # fmt: skip


def block_into(x):
    """The same, into parts of larger tensors."""
    rows, n = x.shape[:-1], x.shape[-1]
    codes, q, e = (torch.zeros(*rows, n + 3, dtype=dtype) for dtype in (torch.uint8, torch.float32, torch.float32))
    scales, zeros = torch.zeros(2, *rows, (n + 3) // 4 + 1)
    w, *rest = block(x)
    return (codes[..., 1 : n + 1], q[..., 2 : n + 2], e[..., 3:], None, scales[..., 1:], zeros[..., :-1],
            torch.zeros(rows), w, *rest)  # fmt: skip


def columns(x):
    u = block(x)[1]
    unseen = torch.zeros_like(x[..., 0, :], dtype=torch.bool)
    return (x.float(), unseen, u, True, None, None, None, None, None, 4, 3, True, 4, True, False, 0.0, 0, 0, 0.2, False,
            False)  # fmt: skip


def spread(x):
    x = x.float()
    return x.clone(), x[..., :3], x[..., :3, :], False


def small(x):
    return hessian(x).float().expand(*x.shape[:-2], *hessian(x).shape) * (1 + 0 * x.sum().float()), False


def packed(x):
    return torch.ops.gradops.gptq_pack(codes(x), 4, False), 4, x.shape[-1], False


def codes(x):
    return (x.detach().abs() * 5).clamp(0, 15).to(torch.uint8)


CALLS = {
    "gptq_block": Call(block, lambda x: quant.gptq_quantize(x, hessian(x), group_size=4).weight, derivatives=0,
                       large=lambda: torch.randn(3, 300, 97, generator=torch.Generator().manual_seed(1))),
    "gptq_block_": Call(block_into, None, own_bits=False, vmap=False),  # returns nothing to compare
    "gptq_columns": Call(columns, lambda x: quant.gptq_quantize(x, hessian(x), method="foem").weight, derivatives=0,
                         large=lambda: torch.randn(3, 300, 297, generator=torch.Generator().manual_seed(1))),
    "gptq_spread_": Call(spread, None, own_bits=False, vmap=False),  # returns nothing to compare
    "prefer_huge_pages": Call(lambda x: (x,), None, own_bits=False, vmap=False),  # changes nothing
    "upper_factor": Call(small, None, vmap=False, large=lambda: torch.randn(3, 5, 127)),
    "gptq_pack": Call(lambda x: (codes(x), 3, True), None, floating=False),
    "gptq_unpack": Call(packed, None, floating=False),
}  # fmt: skip
