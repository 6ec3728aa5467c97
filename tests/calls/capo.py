import torch

from gradops import rl

from . import Call


def tokens() -> torch.Tensor:
    return torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def large() -> torch.Tensor:
    return torch.randn(700, 160, generator=torch.Generator().manual_seed(1))


def support(x):
    n = x.shape[0]
    return x[:, :4].softmax(-1), torch.arange(n) % 5 - 1, x[:, 0], torch.arange(4 * n).reshape(n, 4) % 9


def moments(x):
    rows = x.new_zeros(9, x.shape[1]) + 0.5
    return rows, rows * 2


def curvature(x):
    probs, action, advantages, ids = support(x)
    return (x, probs, action, advantages, ids, *moments(x), 0.9, 0.999, 1e-8, 3)


def public_curvature(x):
    probs, action, advantages, ids = support(x)
    m, s = moments(x)
    return torch.stack(rl.capo_curvature(x, probs, action, advantages, model="adam", token_ids=ids, exp_avg=m,
                                         exp_avg_sq=s, step=3))


def update(x):
    probs, action, advantages, ids = support(x)
    return (*moments(x), x, probs, action, advantages, ids, torch.ones_like(action, dtype=torch.bool), 0.9, 0.999)


def public_update(x):
    probs, action, advantages, ids = support(x)
    m, s = moments(x.detach())
    rl.capo_update_moments_(m, s, x, probs, action, advantages, ids, torch.ones_like(action, dtype=torch.bool))
    return torch.stack([m, s])


def closed(x):
    return x, -x[:, 0].abs(), x[:, 1].abs(), x[:, 2].abs(), x[:, 3]


CALLS = {
    "capo_curvature": Call(curvature, public_curvature, tokens, large, derivatives=0, vmap=False),
    "capo_curvature_sgd": Call(closed, lambda x: torch.stack(rl.capo_curvature_sgd(*closed(x))), tokens, large,
                               derivatives=0, vmap=False),
    # It returns nothing: its test for threads is its own.
    "capo_update_moments_": Call(update, public_update, tokens, large, derivatives=0, own_bits=False, vmap=False),
}
