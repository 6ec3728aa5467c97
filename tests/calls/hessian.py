import torch

from gradops import quant

from . import Call, gram


def hessian(x):
    h = x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-1])
    quant.hessian_update_(h, x, 3)
    return h


def cross(x):
    d = x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-1])
    quant.gptaq_cross_update_(d, x, x * 0.5, 3)
    return d


def raw(x):
    return x.new_zeros(len(x), x.shape[-1], x.shape[-1]), torch.full((len(x),), 3)


def positive(x):
    return gram(x.mT) + torch.eye(x.shape[-1], dtype=x.dtype)


CALLS = {
    "hessian_update_": Call(lambda x: (raw(x)[0], x, raw(x)[1], None, False), hessian, derivatives=0, vmap=False),
    "gptaq_cross_update_": Call(lambda x: (raw(x)[0], x, x * 0.5, raw(x)[1], None, False), cross, derivatives=0,
                                vmap=False),
    # Products and factorisations are torch's own.
    "hessian_factor": Call(lambda x: (positive(x), 0.01, 0.01, True), lambda x: quant.hessian_factor(positive(x))[0],
                           derivatives=0, own_bits=False),
}
