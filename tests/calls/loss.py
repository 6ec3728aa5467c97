import torch

from gradops import rl

from . import Call


def sequences():
    return -torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def large():
    return -torch.rand(90, 2050, generator=torch.Generator().manual_seed(1))


def like(x, seed):
    """Constants of the shape and dtype of x."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).roll(seed).reshape(x.shape)


CALLS = {
    "policy_loss": Call(
        lambda x: (x, like(x, 1) / 4, like(x, 3), None, None, like(x, 5), None, 0, 0, 3, 1,
                   [0.8, 1.2, 3.0, 5.0, 1.0, 1.05, 0.1, 0.0]),
        lambda x: rl.policy_loss(x, like(x, 1) / 4, like(x, 3), ref_logp=like(x, 5), beta=0.1)[0],
        example=sequences, large=large, derivatives=1, vmap=False),
    "rollout_correction": Call(
        lambda x: (x, like(x, 1) / 4, None, None, 0, True, 0.0, 2.0, -1.0),
        lambda x: rl.rollout_correction(x, like(x, 1) / 4)[0],
        example=sequences, large=large, derivatives=0, vmap=False),
}  # fmt: skip
