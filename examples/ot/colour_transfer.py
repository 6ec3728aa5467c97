"""The colours of one photograph in another: sparse, quadratic and entropic transport between palettes.

Both photographs come with scikit-learn. k-means reduces each to 256 colours; a plan moves the palette of the picture
(columns) to the palette of the colours (rows), and every pixel takes the mean of the colours its own was moved to.
With max_nz that is a mean of at most max_nz colours, so that they stay clean; entropic transport averages over many,
and greys.

    pip install scikit-learn pillow
    python examples/ot/colour_transfer.py
"""
import argparse
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_sample_image
from torch import Tensor

from gradops import ot

METHODS = {"max_nz = 1": 1, "max_nz = 2": 2, "max_nz = 4": 4, "quadratic": None, "entropic": 0}


def palette(image: np.ndarray, colours: int, seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Colours, the share of pixels that have each, and which one a pixel has."""
    pixels = image.reshape(-1, 3)
    some = pixels[:: max(1, len(pixels) // 20000)]
    means = MiniBatchKMeans(colours, n_init=1, max_iter=20, random_state=seed).fit(some)
    label = means.predict(pixels)
    share = np.bincount(label, minlength=colours) / len(label)
    return torch.from_numpy(means.cluster_centers_).double(), torch.from_numpy(share), label


def transfer(x: Tensor, a: Tensor, y: Tensor, b: Tensor, max_nz: int | None, reg: float, entropic_reg: float,
             ) -> tuple[Tensor, ot.OTResult]:
    """Where the colours y go, and the plan from x (rows) to y."""
    M = torch.cdist(x, y) ** 2
    M = M / M.max()
    result = ot.entropic(M, a, b, reg=entropic_reg) if max_nz == 0 else ot.solve(M, a, b, reg=reg, max_nz=max_nz)
    T = result.plan.to_dense()
    return torch.where(b[:, None] > 0, T.T @ x / T.sum(0)[:, None].clamp_min(1e-300), y), result


def plot(pictures: dict[str, np.ndarray], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, (len(pictures) + 1) // 2, figsize=(14, 5.4), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(picture.clip(0, 1))
        axis.set_title(name)
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--colours", type=int, default=256, help="of each palette (default: 256)")
    parser.add_argument("--stride", type=int, default=1, help="take every so manyth pixel (default: 1)")
    parser.add_argument("--reg", type=float, default=1.0, help="quadratic (default: 1, for costs up to 1)")
    parser.add_argument("--entropic-reg", type=float, default=1e-2, help="(default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of k-means (default: 0)")
    parser.add_argument("--plot", type=Path, default=Path("ot_colour_transfer.png"), help="where the pictures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    picture, colours = (load_sample_image(f"{name}.jpg")[:: options.stride, :: options.stride] / 255.0
                        for name in ("china", "flower"))
    x, a, _ = palette(colours, options.colours, options.seed)
    y, b, label = palette(picture, options.colours, options.seed)
    M = torch.cdist(x, y) ** 2
    pictures = {"picture": picture, "colours": colours}
    heads = ("plan", "seconds", "<T, M>", "entries per column", "rows off by", "status")
    table = Table(*heads, box=None, pad_edge=False)
    for name, max_nz in METHODS.items():
        began = time.perf_counter()
        moved, result = transfer(x, a, y, b, max_nz, options.reg, options.entropic_reg)
        seconds, T = time.perf_counter() - began, result.plan.to_dense()
        pictures[name] = moved.numpy()[label].reshape(picture.shape)
        entries = f"{float((T > 0).sum(0)[b > 0].double().mean()):.1f}"
        table.add_row(name, f"{seconds:.3f}", f"{float((T * M).sum() / M.max()):.5f}", entries,
                      f"{float(result.marginal_err):.1e}", str(result.status))
    console = Console()
    console.print(table)
    plot(pictures, options.plot)
    console.print(f"pictures: {options.plot}")


if __name__ == "__main__":
    sys.exit(main())
