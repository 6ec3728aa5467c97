"""Quantised models on disk, as vLLM, transformers and GPTQModel read them."""
import json
import re
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ._layers import is_layer, layer_of, put
from .gptq_pack import unpack_gptq
from .quantized_linear import QuantizedLinear

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def save_quantized(model: nn.Module, path: str | PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a model with :class:`QuantizedLinear` layers as a checkpoint: safetensors, `quantize_config.json`, and
    `config.json` with `quantization_config`.

    Args:
        model: as :func:`quantize_model` leaves it. If it has a ``config`` with ``to_dict``, as models of `transformers`
            do, that goes into `config.json`.
        path: a directory; made if it is not there. Files of these names in it are replaced.
        max_shard_bytes: tensors go into files of at most this size (a larger tensor has one of its own).

    Raises:
        ValueError: the model has no quantised layer, or layers of several kinds, which the format cannot say.
        ModuleNotFoundError: `safetensors` is missing (``pip install 'gradops[quant]'``).

    What the configuration says is read off the layers: ``sym`` if every zero point is ``2^(bits-1)``, ``desc_act`` if a
    ``g_idx`` is not in order. Linear layers in full precision are listed under ``dynamic``, which GPTQModel and vLLM
    understand. Tensors that share memory (tied weights) are written once, under their first name.
    """
    save_file = _safetensors().save_file
    path = Path(path)
    settings = _quantization_config(model)
    path.mkdir(parents=True, exist_ok=True)
    for old in (*path.glob("model-*-of-*.safetensors"), path / _INDEX, path / _SINGLE):
        old.unlink(missing_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in _unshared(model).items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = _SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _write(path / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    _write(path / "quantize_config.json", settings)
    own: Any = getattr(model, "config", None)
    config = own.to_dict() if hasattr(own, "to_dict") else {"architectures": [type(model).__name__]}
    _write(path / "config.json", config | {"quantization_config": settings})


def load_quantized(path: str | PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that :func:`save_quantized` wrote, or another checkpoint in the GPTQ format.

    Args:
        path: the directory.
        model: a model of the same architecture, whose weights do not matter; it is modified and returned. None: built
            by `transformers` from `config.json`.

    Raises:
        FileNotFoundError: a file is missing. ValueError: the checkpoint is not in the GPTQ format, or its names are not
        those of the model.
        ModuleNotFoundError: `safetensors`, or without ``model`` `transformers`, is missing
        (``pip install 'gradops[quant]'``).
    """
    load_file = _safetensors().load_file
    path = Path(path)
    config = json.loads((path / "config.json").read_text())
    settings = config.get("quantization_config") or json.loads((path / "quantize_config.json").read_text())
    if settings.get("quant_method", "gptq") != "gptq":
        raise ValueError(f"{path}: quant_method must be 'gptq', got {settings['quant_method']!r}")
    if model is None:
        from ._huggingface import empty_model

        model = empty_model(path)
    index = path / _INDEX
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [_SINGLE]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(path / file)
    _quantized_layers(model, tensors, settings)
    missing, unknown = model.load_state_dict(tensors, strict=False)
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    held = {x.data_ptr() for name, x in model.state_dict().items() if name in tensors}
    state = model.state_dict()
    missing = [name for name in missing if state[name].data_ptr() not in held]  # the rest is tied to one that is there
    if missing or unknown:
        raise ValueError(f"{path}: tensors that the model has and the checkpoint lacks: {missing}; "
                         f"that the checkpoint has and the model lacks: {unknown}")
    return model.eval()


def _safetensors() -> Any:
    try:
        from safetensors import torch as module
    except ModuleNotFoundError as error:
        says = "checkpoints need safetensors: pip install 'gradops[quant]'"
        raise ModuleNotFoundError(says, name=error.name) from None
    return module


def _quantized_layers(model: nn.Module, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Moves the quantised layers of a checkpoint out of its tensors and into the model."""
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    for name in names:
        try:
            old = model.get_submodule(name)
        except AttributeError:
            old = nn.Module()
        if not is_layer(old):
            raise ValueError(f"the checkpoint has a quantised layer {name}, the model has no Linear of that name")
        own = ("qweight", "qzeros", "scales", "g_idx", "bias")
        parts = {key: tensors[f"{name}.{key}"] for key in own if f"{name}.{key}" in tensors}
        put(model, name, layer_of(parts, settings["bits"], settings["group_size"], form))


def _quantization_config(model: nn.Module) -> dict[str, Any]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    kinds = {(m.bits, m.group_size, m.checkpoint_format) for m in layers.values()}
    if len(kinds) != 1:
        raise ValueError("model must have quantised layers of one kind, got "
                         + (f"(bits, group_size, checkpoint_format) {sorted(kinds)}" if kinds else "none"))  # fmt: skip
    ((bits, group_size, form),) = kinds
    plain = [name for name, m in model.named_modules() if is_layer(m) and name.rpartition(".")[2] != "lm_head"]
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": form,
        "desc_act": any(bool((m.g_idx.diff() < 0).any()) for m in layers.values()),
        "sym": all(_symmetric(m) for m in layers.values()), "lm_head": False, "true_sequential": True,
        "pack_dtype": "int32", "meta": {"quantizer": [f"gradops:{version('gradops')}"]},
    }  # fmt: skip
    return settings | ({"dynamic": {f"-:^{re.escape(name)}$": {} for name in plain}} if plain else {})


def _symmetric(layer: QuantizedLinear) -> bool:
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    zeros = unpack_gptq(parts, bits=layer.bits, checkpoint_format=layer.checkpoint_format).zeros
    return bool((zeros == 2 ** (layer.bits - 1)).all())


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state in contiguous memory of its own; of tied parameters, the first name."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    later = {name for name, p in model.named_parameters(remove_duplicate=False) if names[id(p)] != name}
    state = {name: x.cpu().contiguous() for name, x in model.state_dict().items() if name not in later}
    held: set[int] = set()
    for name, x in state.items():
        place = x.untyped_storage().data_ptr()
        if place in held:
            state[name] = x.clone()
        held.add(place)
    return state


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
