import torch

from gradops import curvature

from . import Call


def target(x):
    """Fixed entries of x's rows, the first of which is ignored."""
    rows = torch.arange(x[..., 0].numel(), device=x.device).view(x.shape[:-1])
    return torch.where(rows == 0, -1, rows * 3 % x.shape[-1])


def losses(x):
    """(..., C): the classes are second for the public function."""
    return curvature.cross_entropy(x.movedim(-1, 1), target(x), ignore_index=-1, reduction="none", label_smoothing=0.1)


def rows(x):
    return x[..., 0].detach().double()


RULE = (-1, 0.1)
CALLS = {
    "cross_entropy": Call(lambda x: (x, target(x), *RULE), losses),
    "cross_entropy_jvp": Call(lambda x: (x, target(x), x + 1, rows(x), *RULE), None),
    "cross_entropy_backward": Call(lambda x: (x, target(x), rows(x), rows(x), *RULE), None),
    "cross_entropy_backward_jvp": Call(
        lambda x: (x, target(x), x + 1, rows(x), rows(x), rows(x), rows(x), *RULE), None),
    "softmax_ce_hvp": Call(lambda x: (x, x + 1, rows(x)), lambda x: curvature.softmax_ce_hvp(x, x + 1), derivatives=0),
    # These give nothing back: tested in their room
    "cross_entropy_backward_": Call(
        lambda x: (x, target(x), rows(x), rows(x), *RULE), None, own_bits=False, vmap=False),
    "cross_entropy_backward_jvp_": Call(
        lambda x: (x, target(x), x.clone(), rows(x), rows(x), rows(x), rows(x), *RULE), None, own_bits=False,
        vmap=False),
    "softmax_ce_hvp_out": Call(lambda x: (x, x, rows(x), x.detach() + 1), None, own_bits=False, vmap=False),
}
