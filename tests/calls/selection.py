import torch

from gradops import rl

from . import Call


def ranking(x):
    n, k = x.shape[-1], x.shape[-1] - 1
    return ((torch.arange(k) * 2 + 1) % n).expand(*x.shape[:-1], k) if n % 2 else torch.arange(k).expand(
        *x.shape[:-1], k)


def answers(x):
    n = x.numel()
    return torch.tensor([0, n // 5, n // 3, n // 2, n]), torch.tensor([0, 3, 4])


CALLS = {
    "plackett_luce_logprob": Call(lambda x: (x, ranking(x)), lambda x: rl.plackett_luce_logprob(x, ranking(x))),
    "plackett_luce_gradient": Call(lambda x: (x, ranking(x)), None),
    "permutation_weights": Call(lambda x: (x.flatten(), *answers(x), 1.0),
                                lambda x: rl.permutation_weights(x.flatten(), answers(x)[0], offsets=answers(x)[1]),
                                derivatives=0, vmap=False),
}
