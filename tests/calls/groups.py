import torch

from gradops import rl

from . import Call


def labels(x):
    return torch.arange(x.shape[0]) % 3



def rewards():
    return torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def many():
    return torch.randn(50_000, generator=torch.Generator().manual_seed(0))


RULE = [0, 0, 0, 0, 0, 0, 0]
CALLS = {
    "group_advantages": Call(
        lambda x: (x, None, labels(x), None, None, None, None, 1, RULE, 1.0, 1e-6, 1.0),
        lambda x: rl.group_advantages(x, ids=labels(x))[0], example=rewards, large=many, derivatives=0, vmap=False,
    ),
    "segment_stats": Call(
        lambda x: (x, None, labels(x), None, None, 3),
        lambda x: rl.segment_stats(x, ids=labels(x), num_groups=3).m2, example=rewards, large=many, derivatives=0,
        vmap=False,
    ),
}  # fmt: skip
