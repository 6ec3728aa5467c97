"""Results of finished layers on disk, so that an interrupted run can go on."""
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._blocks import tensors
from ._layers import layer_of, weight_of
from ._report import ModuleResult
from .config import QuantizeConfig
from .quantized_linear import QuantizedLinear


class Store:
    """One file per layer, and `run.json`, which says of which run they are. Without a directory it holds nothing."""

    def __init__(self, directory: str | os.PathLike[str] | None, model: nn.Module, layers: Sequence[str],
                 batches: Sequence[Any], config: QuantizeConfig) -> None:  # fmt: skip
        self.directory, self.config = None if directory is None else Path(directory), config
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        weights = (weight_of(model.get_submodule(name)) for name in layers)
        run = {"config": asdict(config) | {"skip": list(config.skip)}, "layers": list(layers),
               "weights": _digest(w[:1] for w in weights), "calibration": _digest(tensors(batches))}  # fmt: skip
        file = self.directory / "run.json"
        if file.exists():
            was = json.loads(file.read_text())
            other = [key for key in run if was.get(key) != run[key]]
            if other:
                raise ValueError(f"resume: {self.directory} holds results of a run with other {' and '.join(other)}; "
                                 "take another directory, or empty this one")  # fmt: skip
        _write(file, lambda path: path.write_text(json.dumps(run, indent=1)))

    def missing(self, layers: Iterable[str]) -> bool:
        return self.directory is None or not all(self._file(name).exists() for name in layers)

    def get(self, name: str) -> tuple[QuantizedLinear, ModuleResult]:
        held = torch.load(self._file(name), weights_only=True)
        layer = layer_of(held["tensors"], self.config.bits, self.config.group_size, self.config.checkpoint_format)
        return layer, ModuleResult(**held["result"])

    def put(self, layer: QuantizedLinear, result: ModuleResult) -> None:
        if self.directory is not None:
            held = {"tensors": {k: v.cpu() for k, v in layer.state_dict().items()}, "result": asdict(result)}
            _write(self._file(result.name), lambda path: torch.save(held, path))

    def _file(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.pt"


def _write(file: Path, write: Any) -> None:
    """A file is there whole or not at all."""
    part = file.with_name(file.name + ".part")
    write(part)
    part.replace(file)


def _digest(xs: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in xs:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
