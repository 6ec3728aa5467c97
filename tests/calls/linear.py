import torch

from gradops import rl

from . import Call


def targets(x):
    return torch.arange(x[..., 0].numel(), device=x.device).view(x.shape[:-1]) % x.shape[-1]


def seeds(x):
    return targets(x) * 1234567


# An enormous temperature makes the sampling policy uniform: else it depends on x, and derivatives must not see that.
CALLS = {
    "one_token_rollout": Call(
        lambda x: (x, targets(x), seeds(x), 1.5, -0.1, 9),
        lambda x: rl.one_token_rollout_loss(x, targets(x), temperature=1e30, beta=-0.4, reduction="none")),
    "one_token_rollout_backward": Call(
        lambda x: (x, targets(x), seeds(x)[..., None] % x.shape[-1], torch.ones_like(x[..., :3], dtype=torch.float64),
                   x[..., 0], 1.5, -0.1), None),
}
