"""Each optimizer against its formula, written out in plain torch for one matrix in float64."""

import math

import pytest
import torch

from gradops.linalg.coefficients import resolve
from gradops.optim import AdamW, Muon, PolarGrad, to_matrices
from gradops.optim.layouts import LAYOUTS, from_matrices

from . import cases
from .cases import ALL, MATRIX, give_grads, parameters, run

SHAPES = [(12, 7), (12, 7), (7, 12), (9, 9), (1, 5), (5, 1), (1, 1), (3, 6, 8)]


def center(x, on):
    return x - x.mean(-2, keepdim=True) if on else x


def polar(m):
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    return u @ vh


def one_sided(m, side, alpha, centred, eps):
    m = center(m, centred)
    n = m.shape[-1] if side == "right" else m.shape[-2]
    gram = (m.mT @ m if side == "right" else m @ m.mT) + eps * torch.eye(n, dtype=m.dtype)
    w, q = torch.linalg.eigh(gram)
    root = (q / w.sqrt().unsqueeze(-2)) @ q.mT
    u = m @ root if side == "right" else root @ m
    nu = (m * u).sum((-2, -1), keepdim=True)
    return center(nu.clamp_min(eps) ** alpha * u, centred)


def row_norm(m, centred, eps):
    m = center(m, centred)
    return center(m / (m.norm(dim=-1, keepdim=True) + eps), centred)


def newton_schulz(m, coefficients, eps):
    x = m / ((1 + eps) * torch.linalg.matrix_norm(m)[..., None, None])
    for a, b, c in resolve(coefficients, 5):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def expected(name, p, grads):
    """The parameter after these gradients."""
    cls, given = ALL[name]
    s = {**cls._defaults, **given}
    lr, wd = s["lr"], s["weight_decay"]
    m = torch.zeros_like(p)
    v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if cls is AdamW:
            b1, b2 = s["betas"]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            step = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + s["eps"])
        elif s.get("polar_first"):
            u = polar(g)
            m = s["momentum"] * m + (1 - s["momentum"]) * u
            step = (g * u).sum((-2, -1), keepdim=True) * m
        else:
            beta = s["momentum"]
            m = beta * m + (1 - beta) * g
            if cls is Muon:
                rows, cols = p.shape[-2:]
                ratio = 0.2 * math.sqrt(max(rows, cols)) if s["adjust_lr_fn"] else math.sqrt(max(1, rows / cols))
                source = (1 - beta) * g + beta * m if s["nesterov"] else m
                step = ratio * newton_schulz(source, s["ns_coefficients"], s["eps"])
            elif cls is PolarGrad:
                u = polar(m)
                step = (m * u).sum((-2, -1), keepdim=True) * u if s["nuclear_scale"] else u
            elif name.startswith(("right", "left")):
                step = one_sided(m, name.partition("-")[0], s["alpha"], s["center"], s["eps"])
            elif name.startswith("row"):
                step = row_norm(m, s["center"], s["eps"])
            elif s["order"] == "row_then_polar":
                w = row_norm(m, s["center"], s["eps"])
                step = one_sided(w, s["side"], s["alpha"], s["center"], s["eps"])
            else:
                step = row_norm(one_sided(m, s["side"], s["alpha"], s["center"], s["eps"]), s["center"], s["eps"])
        p = (1 - lr * wd) * p - lr * step
    return p


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_formula(name, dtype, tol):
    # A centred matrix of one row is zero and so singular: its spectral step is rounding noise.
    shapes = [s for s in SHAPES if s[-2] > 1 or not name.endswith(("centred", "left", "hybrid-polar-first"))]
    params = parameters(*shapes, dtype=dtype)
    before = [p.detach().clone() for p in params]
    cls, settings = ALL[name]
    opt = cls(params, **settings)
    grads = [[] for _ in params]
    for k in range(3):
        give_grads(params, seed=k)
        for seen, p in zip(grads, params, strict=True):
            seen.append(p.grad.double())
        opt.step()
    for p, start, seen in zip(params, before, grads, strict=True):
        torch.testing.assert_close(p.detach().double(), expected(name, start.double(), seen), rtol=tol, atol=tol)


@pytest.mark.parametrize("name", ALL)
def test_maximize_is_minimising_the_negative(name):
    cls, settings = ALL[name]
    up, down = parameters((6, 4), (6, 4)), parameters((6, 4), (6, 4))
    a, b = cls(up, maximize=True, **settings), cls(down, **settings)
    for k in range(2):
        give_grads(up, k)
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad
        a.step(), b.step()
    assert all(torch.equal(p, q) for p, q in zip(up, down, strict=True))


@pytest.mark.parametrize("name", MATRIX)
def test_conv_and_layouts(name):
    cls, settings = MATRIX[name]
    for layout, shape, heads in [
        ("flat", (6, 2, 2, 2), None), ("transposed", (5, 8), None), ("heads", (12, 5), 3), ("heads_in", (5, 12), 3),
        ("gate_up", (2, 8, 5), None), ("gate_up_interleaved", (2, 5, 8), None),
    ]:  # fmt: skip
        p, q = parameters(shape)[0], torch.nn.Parameter(to_matrices(parameters(shape)[0].detach(), layout, heads))
        a, b = cls([p], layout=layout, heads=heads, **settings), cls([q], **settings)
        for k in range(2):
            give_grads([p], k)
            q.grad = to_matrices(p.grad, layout, heads).contiguous()
            a.step(), b.step()
        torch.testing.assert_close(to_matrices(p.detach(), layout, heads), q.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_round_trip(layout):
    x = torch.arange(2 * 12 * 8.0).reshape(2, 12, 8)
    assert torch.equal(from_matrices(to_matrices(x, layout, 4), layout, x.shape), x)


def test_gate_up_rows_hold_one_neuron():
    gate, up = torch.randn(4, 3), torch.randn(4, 3)  # 4 neurons of width 3
    rows = to_matrices(torch.cat([gate, up]), "gate_up")
    assert torch.equal(rows, torch.cat([gate, up], dim=1))
    woven = torch.stack([gate.T, up.T], dim=-1).reshape(3, 8)  # columns gate0, up0, gate1, up1, ...
    assert torch.equal(to_matrices(woven, "gate_up_interleaved"), rows)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_torch_muon(dtype, nesterov):
    shapes = [(32, 32), (32, 32), (64, 16), (16, 64)]
    ours, theirs, start = ([p.data.mul_(1e-3) for p in parameters(*shapes, dtype=dtype)] for _ in range(3))
    ours, theirs = map(torch.nn.Parameter, ours), map(torch.nn.Parameter, theirs)
    ours, theirs = list(ours), list(theirs)  # small, so that bfloat16 parameters resolve the steps
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    # torch rescales its own momentum for bfloat16 without nesterov (tested in test_defects), so compare one step.
    steps = 1 if dtype == torch.bfloat16 and not nesterov else 5
    run(Muon(ours, ns_coefficients="simple", precision="medium", **kwargs), ours, steps)
    run(torch.optim.Muon(theirs, **kwargs), theirs, steps)
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        moved, difference = (q - p0).norm(), (p - q).norm()
        assert difference < 0.03 * moved  # five bfloat16 steps, differently rounded


@pytest.mark.parametrize("name", cases.MATRIX)
def test_batched_equals_one_by_one(name):
    cls, settings = MATRIX[name]
    many, single = parameters(*[(16, 8)] * 5), parameters(*[(16, 8)] * 5)
    run(cls(many, **settings), many)
    for k in range(3):
        give_grads(single, 10 + k)
        for p in single:
            if k == 0:
                p.opt = cls([p], **settings)
            p.opt.step()
    assert all(torch.equal(p, q) for p, q in zip(many, single, strict=True))
