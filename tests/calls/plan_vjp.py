import torch

from gradops.ot.plan_vjp import plan_vjp

from . import Call


def split(x):
    """g is x, on a support with a hole; every column's entries are the first rows."""
    m, width = x.shape[-2:]
    index = torch.arange(width).expand(x.shape)
    value = torch.ones(x.shape, dtype=torch.float64)
    value[..., ::2, -1:] = 0
    rows = x.new_zeros((*x.shape[:-2], width)).double()
    return index, value, x.double(), rows, rows[..., :1].expand(*rows.shape[:-1], m)


CALLS = {
    "plan_vjp": Call(split, lambda x: torch.cat([plan_vjp(*split(x))[0], plan_vjp(*split(x))[1][..., None, :]], -2)),
}
