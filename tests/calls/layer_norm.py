from gradops import curvature

from . import Call


def parts(x):
    """x, a weight, a bias and statistics of the shapes of an op's arguments."""
    weight = x.narrow(-2, 0, 1).squeeze(-2)
    weight = weight[(0,) * (weight.dim() - 1)] if weight.dim() > 1 else weight
    return x, weight, weight.cos(), x[..., :2].double().exp()


def tangent(x):
    x, weight, bias, stats = parts(x)
    return x, weight, bias, stats, x.sin(), weight.sin(), bias.sin(), True


def gradient(x):
    x, weight, bias, stats = parts(x)
    return x, weight, bias, stats, x.cos(), True, 7


def change(x):
    x, weight, bias, stats = parts(x)
    return x, weight, bias, stats, x.cos(), x.sin(), weight.sin(), stats.sin(), x + 1, True, 7


CALLS = {
    "layer_norm": Call(lambda x: (*parts(x)[:3], 1e-5, True),
                       lambda x: curvature.layer_norm(x, x.new_ones(x.shape[-1]))),
    "layer_norm_jvp": Call(tangent, None),
    "layer_norm_backward": Call(gradient, None),
    "layer_norm_backward_jvp": Call(change, None),
}
