"""Sven: one step against SGD's, against the same step in plain torch, and against TorchJD's Gram matrix."""
import copy
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from gradops import optim

from ..harness import Case, Settings

# Widths of a perceptron, and how many samples.
SHAPES = [((3072, 300, 300, 10), 128), ((784, 512, 512, 10), 256), ((1, 16, 16, 16, 1), 32)]
LR = 1e-6  # nothing moves far while it is timed


def cases(settings: Settings) -> Iterator[Case]:
    for widths, samples in SHAPES[:1] if settings.quick else SHAPES:
        yield case(widths, samples, settings)


def perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d, p in itertools.pairwise(widths):
        layers += [nn.Linear(d, p), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def per_sample_gradients(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, params, x[None]), y[None])[0]

    return vmap(grad(one), (None, 0, 0))(params, x, y)


def case(widths: tuple[int, ...], samples: int, settings: Settings) -> Case:
    torch.manual_seed(0)
    models = [perceptron(widths).to(settings.device)]
    models += [copy.deepcopy(models[0]) for _ in range(3)]
    x = torch.randn(samples, widths[0], device=settings.device)
    if widths[-1] > 1:
        y = torch.randint(widths[-1], (samples,), device=settings.device)

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, y, reduction="none")
    else:
        y = torch.randn(samples, device=settings.device)

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return (z[:, 0] - y).square()

    sven = optim.Sven(models[0].parameters(), lr=LR, k=samples // 2)
    sgd = torch.optim.SGD(models[1].parameters(), lr=LR)

    def our_step() -> None:
        with sven.capture(models[0]):
            losses = loss(models[0](x), y)
        sven.step(losses)

    def sgd_step() -> None:
        sgd.zero_grad()
        loss(models[1](x), y).mean().backward()
        sgd.step()

    @torch.no_grad()
    def torch_step() -> None:
        """As one writes it: the Jacobian, its Gram matrix in float64, the update."""
        model = models[2]
        rows = loss(model(x), y).double()
        J = torch.cat([g.flatten(1) for g in per_sample_gradients(model, x, y, loss).values()], 1)
        G = sum((c @ c.mT for c in (part.double() for part in J.split(2**14, 1))), rows.new_zeros(samples, samples))
        values, U = torch.linalg.eigh(G)
        sigma = values.clamp_min(0).sqrt()
        keep = (sigma > 1e-3 * sigma[-1]) & (torch.arange(samples, device=x.device) >= samples - samples // 2)
        w = U @ (torch.where(keep, 1 / torch.where(keep, values, 1), 0) * (U.mT @ rows))
        step = w.float() @ J
        for p in model.parameters():
            p -= LR * step[:p.numel()].view_as(p)
            step = step[p.numel():]

    @torch.no_grad()
    def gram_of_gradients() -> Tensor:
        J = torch.cat([g.flatten(1) for g in per_sample_gradients(models[2], x, y, loss).values()], 1)
        return J @ J.T

    peers: dict[str, Callable[[], object]] = {
        "SGD": sgd_step,
        "vmap(grad), no step": lambda: per_sample_gradients(models[2], x, y, loss),
        "vmap(grad), Gram in float32": gram_of_gradients,
    }
    if find_spec("torchjd"):
        from torchjd.autogram import Engine

        engine = Engine(models[3], batch_dim=0)
        peers["TorchJD, Gram only"] = lambda: engine.compute_gramian(loss(models[3](x), y))
    features = sum(widths[:-1]) + sum(widths[1:])
    products = 2 * samples * sum(d * p for d, p in itertools.pairwise(widths))
    return Case(
        "Sven.step", f"{'-'.join(map(str, widths))}, B={samples}", torch.float32,
        ours=our_step, reference=torch_step, peers=peers,
        # Forward, update, and backward but for the first layer; the Gram matrix counts as if it were in float32.
        flops={torch.float32: float(3 * products - 2 * samples * widths[0] * widths[1] + samples**2 * features)},
    )  # fmt: skip
