import torch

from gradops import rl

from . import Call


def large():  # several chunks per row; the row is too long for one thread
    return torch.randn(1, 60000, generator=torch.Generator().manual_seed(0))


def every(n, x):  # every n-th token
    return (torch.arange(x.shape[-1], device=x.device) % n == 1).expand(x.shape)


def values(x):
    return 0.5 * x + 1


CALLS = {
    "advantage_scan": Call(
        lambda x: (x, values(x), None, x[..., 0], None, every(4, x), None, ~every(3, x), None, 0.9, 0.8, 1.0, 1.0),
        lambda x: sum(rl.gae(x, values(x), last_values=x[..., 0], terminated=every(4, x), mask=~every(3, x), gamma=0.9,
                             lam=0.8)),
        large=large),
    "return_scan": Call(
        lambda x: (x, None, values(x), None, every(4, x), every(3, x), ~every(5, x), None, 0.9, 0.8),
        lambda x: rl.lambda_returns(x, next_values=values(x), terminated=every(4, x), truncated=every(3, x),
                                    mask=~every(5, x), gamma=0.9, lam=0.8),
        large=large),
    "carry_scan": Call(lambda x: (x, every(4, x).to(x.dtype) * 0.9, None), None, large=large),
    "allocate_rollouts": Call(lambda p: (p.flatten().double().sigmoid(), 200, 1, 9, True),
                              lambda p: rl.allocate_rollouts(p.flatten().sigmoid(), 200, low=1, high=9),
                              large=lambda: torch.linspace(-9, 9, 100), derivatives=0, vmap=False),
}
