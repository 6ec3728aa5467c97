import torch

from gradops import linalg

from . import Call, gram

COEFFICIENTS = [2.0, -1.5, 0.5] * 3


def spd(x):
    return gram(x) + torch.eye(x.shape[-2], dtype=x.dtype)


def product(x):
    left, right = x[0].float(), x[1].mT.bfloat16()
    return torch.zeros(len(left), right.shape[1]), left, right, True


def layer(x, mode="pairs"):
    x = x if x.dim() == 3 else x[None]
    return linalg.gram_outer(x, x[..., :2], mode=mode)


CALLS = {
    "row_norm": Call(lambda x: (x, 1e-8, True), lambda x: linalg.row_norm(x, center=True)),
    "nuclear_scale": Call(lambda x: (x, x + 1), lambda x: linalg.nuclear_scale(x, x + 1)),
    "newton_schulz": Call(lambda x: (x, COEFFICIENTS, True, 0), lambda x: linalg.newton_schulz(x, 3)),
    "wide_matmul_": Call(product, None, own_bits=False, vmap=False),  # gives nothing back: tested in its room
    "gram": Call(lambda x: ([x, x[..., :3]], True), lambda x: linalg.gram([x, x[..., :3]])),
    "gram_outer": Call(lambda x: ([x, x], [x[..., :2], x + 1], [True, False]), layer, derivatives=0, vmap=False),
    "gram_outer_blocks": Call(lambda x: (x, x[..., :2], True), lambda x: layer(x, "blocks"), derivatives=0, vmap=False),
    "jt_apply": Call(lambda x: (x, x[..., 0].double()), lambda x: linalg.jt_apply(x, x[..., 0])),
    # These orchestrate torch's own ops: their bits are torch's.
    "polar": Call(lambda x: (x, "right", "auto", True, "highest"), lambda x: linalg.polar(x)[0], own_bits=False),
    "inv_sqrt": Call(lambda x: (spd(x), 0.0), lambda x: linalg.inv_sqrt(spd(x)), own_bits=False),
    "spectral_solve": Call(lambda x: (gram(x), x[..., 0], 3, 1e-3, 1e-10, "smooth", 0.1, 1.0),
                           lambda x: linalg.spectral_solve(gram(x), x[..., 0])[0], derivatives=0, own_bits=False),
    "one_sided_factor": Call(lambda x: (x.mT, 1e-8), lambda x: linalg.one_sided_polar(x.mT), own_bits=False),
}
