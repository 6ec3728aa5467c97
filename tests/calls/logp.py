import torch

from gradops import rl

from . import Call


def targets(x, k):
    """Fixed entries of x's rows."""
    rows = torch.arange(x[..., 0].numel(), device=x.device).view(*x.shape[:-1], 1)
    return (rows * 3 + torch.arange(k, device=x.device)) % x.shape[-1]


def public(x):
    logp, lse, entropy, p3 = rl.selective_log_softmax(
        x, targets(x, 2), temperature=0.7, softcap=5.0, return_=("logp", "lse", "entropy", "sum_p3"),
        out_dtype=torch.float64)
    return logp.sum(-1) + 0.3 * lse * lse + entropy + p3


def backward(x):
    """Arguments of the raw backward."""
    rows = x[..., 0].detach().double()
    return (x, targets(x, 2), None, None, rows.abs() + 5, rows, torch.ones_like(targets(x, 2), dtype=torch.float64),
            rows, rows, 0.7, 5.0)


CALLS = {
    "selective_log_softmax": Call(lambda x: (x, targets(x, 2), None, None, 0.7, 5.0, True, True, False), public),
    "selective_log_softmax_backward": Call(backward, None),
    "selective_log_softmax_backward_": Call(backward, None, own_bits=False),  # gives nothing back: tested in its room
    "top_p_keep": Call(lambda x: (x, 0.8, 1), None),
}
