"""The optimizers under test, and parameters with gradients for them."""

import torch

from gradops.optim import (
    AdamW,
    HybridPolarGradM,
    LeftPolarGradM,
    Muon,
    PolarGrad,
    RightPolarGradM,
    RowNormM,
)

MATRIX = {
    "muon": (Muon, {"lr": 0.02, "weight_decay": 0.1}),
    "muon-plain": (Muon, {"lr": 0.02, "nesterov": False, "ns_coefficients": "simple"}),
    "muon-rms": (Muon, {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}),
    "polargrad": (PolarGrad, {"lr": 0.02, "weight_decay": 0.1}),
    "polargrad-plain": (PolarGrad, {"lr": 0.02, "momentum": 0.0}),
    "polargrad-polar-first": (PolarGrad, {"lr": 0.02, "polar_first": True}),
    "polargrad-unscaled": (PolarGrad, {"lr": 0.02, "nuclear_scale": False}),
    "right": (RightPolarGradM, {"lr": 0.02, "weight_decay": 0.1}),
    "right-centred": (RightPolarGradM, {"lr": 0.02, "center": True, "alpha": 0.0}),
    "left": (LeftPolarGradM, {"lr": 0.02}),
    "row": (RowNormM, {"lr": 0.02, "weight_decay": 0.1}),
    "row-centred": (RowNormM, {"lr": 0.02, "center": True}),
    "hybrid": (HybridPolarGradM, {"lr": 0.02, "weight_decay": 0.1}),
    "hybrid-polar-first": (HybridPolarGradM, {"lr": 0.02, "order": "polar_then_row", "side": "left", "center": True}),
}
ALL = {**MATRIX, "adamw": (AdamW, {"lr": 0.02, "weight_decay": 0.1})}


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_grads(params, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def run(opt, params, steps=3, seed=10):
    for k in range(steps):
        give_grads(params, seed + k)
        opt.step()
    return [p.detach().clone() for p in params]
