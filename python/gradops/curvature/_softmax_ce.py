import torch


def _y(z, target, ii, ls):
    keep = (target != ii)[..., None]
    y = torch.full_like(z, ls / z.shape[-1])
    y.scatter_add_(-1, torch.where(keep, target[..., None], 0), torch.full_like(z[..., :1], 1 - ls))
    return y, keep


def softmax_ce(z, target, ii, ls):
    y, keep = _y(z, target, ii, ls)
    lse = z.logsumexp(-1)
    dot = torch.where(y == 0, 0, y * z).sum(-1)
    return torch.where(keep[..., 0], lse - dot, 0).double(), lse.double()


def softmax_ce_jvp(z, target, z_dot, lse, ii, ls):
    y, keep = _y(z, target, ii, ls)
    p = (z - lse[..., None]).exp().to(z.dtype)
    lse_dot = (p * z_dot).sum(-1)
    return torch.where(keep[..., 0], lse_dot - (y * z_dot).sum(-1), 0).double(), lse_dot.double()


def softmax_ce_backward_(z, target, lse, g, ii, ls):
    y, keep = _y(z, target, ii, ls)
    z.copy_(torch.where(keep, g[..., None] * ((z - lse[..., None]).exp() - y), 0))


def softmax_ce_backward_jvp_(z, target, z_dot, lse, lse_dot, g, g_dot, ii, ls):
    y, keep = _y(z, target, ii, ls)
    p = (z - lse[..., None]).exp()
    out = g[..., None] * p * (z_dot - lse_dot[..., None])
    if g_dot is not None:
        out = out + g_dot[..., None] * (p - y)
    z_dot.copy_(torch.where(keep, out, 0))


def softmax_ce_hvp_out(z, u, scale, out):
    p = z.softmax(-1)
    out.copy_(scale[..., None] * p * (u - (p * u).sum(-1, keepdim=True)))
