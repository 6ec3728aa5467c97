"""The spectral density of the Hessian and of the Gauss-Newton matrix of a small transformer, before and after training.

The text is Python's own language documentation, read byte by byte. Training makes the known picture: most eigenvalues
within a narrow bulk about 0, a few far outside, and negative ones that the Gauss-Newton matrix does not have. The
model runs under torch's plain attention, the only one with second derivatives.

    python examples/spectrum/transformer.py
"""
import argparse
import time
from pathlib import Path
from pydoc_data import topics

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradops import curvature

CONTEXT, BATCH, WIDTH, LAYERS, HEADS = 32, 8, 32, 2, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions.weight))).flatten(0, 1)


def read() -> tuple[Tensor, int]:
    raw = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    alphabet, ids = torch.tensor(list(raw)).unique(return_inverse=True)
    return ids, len(alphabet)


def batch(ids: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    windows = ids[torch.randint(len(ids) - CONTEXT, (size, 1), generator=generator) + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:].flatten()


def spectra(model: nn.Module, x: Tensor, y: Tensor, k: int, starts: int) -> dict[str, curvature.SpectralDensity]:
    hessian = curvature.linearize_grad((model, lambda m: F.cross_entropy(m(x), y)), None)
    outputs = model, lambda m: m(x)
    matvecs = {"Hessian": hessian, "Gauss-Newton": lambda v: curvature.ggnvp(outputs, "cross_entropy", None, v)}
    out = {}
    for name, matvec in matvecs.items():
        generator = torch.Generator().manual_seed(0)
        top = curvature.lanczos(matvec, k, like=hessian.grad, generator=generator).eigenvalues
        trace, error = curvature.hutchinson_trace(matvec, k // 2, like=hessian.grad, generator=generator)
        print(f"  {name:13} eigenvalues {top[0]:8.3f} to {top[-1]:8.3f}, trace {trace:8.2f} +- {error:.2f}")
        out[name] = curvature.slq_density(matvec, k, starts, like=hessian.grad, generator=generator)
    return out


def plot(stages: dict[str, dict[str, curvature.SpectralDensity]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(stages), figsize=(10, 4), layout="constrained", sharey=True)
    for ax, (stage, found) in zip(axes, stages.items(), strict=True):
        for name, d in found.items():
            ax.semilogy(d.grid, d.density.clamp_min(1e-7), label=name)
        ax.set(title=stage, xlabel="eigenvalue", ylim=(1e-6, None))
    axes[0].set_ylabel("density")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lanczos", type=int, default=50, help="steps of each run")
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--png", type=Path, default=Path("build/spectrum.png"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.lanczos, options.starts = 3, 5, 1
    torch.manual_seed(0)
    (ids, vocabulary), generator = read(), torch.Generator().manual_seed(0)
    model = Transformer(vocabulary)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, y = batch(ids, 2 * BATCH, torch.Generator().manual_seed(1))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {torch.get_num_threads()} threads")
    stages, start = {}, time.perf_counter()
    with sdpa_kernel(SDPBackend.MATH):
        for stage, steps in (("at the start", 0), (f"after {options.steps} steps", options.steps)):
            for _ in range(steps):
                inputs, targets = batch(ids, BATCH, generator)
                opt.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                opt.step()
            print(f"{stage}, {time.perf_counter() - start:.1f} s:")
            stages[stage] = spectra(model, x, y, options.lanczos, options.starts)
    plot(stages, options.png)
    print(f"Densities, {time.perf_counter() - start:.1f} s: {options.png}")


if __name__ == "__main__":
    main()
