import torch

from gradops import rl

from . import Call


def targets(x):
    return torch.arange(x[..., 0].numel(), device=x.device).view(x.shape[:-1]) % x.shape[-1]


def seeds(x):
    return targets(x) * 1234567


def weight(x):
    return x.flatten(0, -2)[:3] * 0.3 + 0.1


def logprob(x):
    y = rl.linear_logprob(x, weight(x), targets(x)[..., None] % 3, x.flatten(0, -2)[:3, 0], temperature=0.8,
                          return_=("logp", "lse", "entropy"), out_dtype=torch.float64, chunk_size=2)
    return y[0].squeeze(-1) + 0.3 * y[1] * y[1] + y[2]


def flat(x):
    rows = x.flatten(0, -2)
    return rows, weight(x), torch.arange(len(rows))[:, None] % 3, None


def flat_backward(x):
    rows = x.flatten(0, -2)[:, 0].detach().double()
    return (*flat(x), rows + 3, rows, rows[:, None], rows, rows, 0.8, 0.0, True, True, True, False, 2)


# An enormous temperature makes the sampling policy uniform: else it depends on x, and derivatives must not see that.
CALLS = {
    # Torch's own products: the bits are torch's.
    "linear_logprob": Call(lambda x: (*flat(x), 0.8, 0.0, True, True, False, 2), logprob, derivatives=1,
                           own_bits=False),
    "linear_logprob_backward": Call(flat_backward, None, own_bits=False),
    "one_token_rollout": Call(
        lambda x: (x, targets(x), seeds(x), 1.5, -0.1, 9),
        lambda x: rl.one_token_rollout_loss(x, targets(x), temperature=1e30, beta=-0.4, reduction="none")),
    "one_token_rollout_backward": Call(
        lambda x: (x, targets(x), seeds(x)[..., None] % x.shape[-1], torch.ones_like(x[..., :3], dtype=torch.float64),
                   x[..., 0], 1.5, -0.1), None),
}
