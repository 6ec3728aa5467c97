import torch

from gradops import rl

from . import Call


def rows(n, t, dtype=torch.float64):
    return torch.randn(n, t, dtype=dtype, generator=torch.Generator().manual_seed(0))


def example():
    return rows(3, 12)[None]


def large():  # several chunks per row, and one row per batch that is too long for one thread
    return rows(1, 60000, torch.float32)


def flags(x, seed):
    return (torch.rand(x.shape[-1:], generator=torch.Generator().manual_seed(seed)) < 0.3).to(x.device).expand(x.shape)


def values(x):
    return 0.5 * x + 1


CALLS = {
    "advantage_scan": Call(
        lambda x: (x, values(x), None, x[..., 0], None, flags(x, 0), None, flags(x, 1), None, 0.9, 0.8, 1.0, 1.0),
        lambda x: sum(rl.gae(x, values(x), last_values=x[..., 0], terminated=flags(x, 0), mask=flags(x, 1), gamma=0.9,
                             lam=0.8)),
        example, large),
    "return_scan": Call(
        lambda x: (x, None, values(x), None, flags(x, 0), flags(x, 1), flags(x, 2), None, 0.9, 0.8),
        lambda x: rl.lambda_returns(x, next_values=values(x), terminated=flags(x, 0), truncated=flags(x, 1),
                                    mask=flags(x, 2), gamma=0.9, lam=0.8),
        example, large),
    "carry_scan": Call(lambda x: (x, flags(x, 0).to(x.dtype) * 0.9, None), None, example, large),
}
