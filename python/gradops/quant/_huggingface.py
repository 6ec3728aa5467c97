"""Models in the layout of Hugging Face, through `transformers`, from local directories only."""
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".h5", ".msgpack",
           ".gguf", ".onnx", ".ot")  # fmt: skip


def _class(config: Any, path: Path) -> Any:
    names = config.architectures or []
    if not names or not hasattr(transformers, names[0]):
        raise ValueError(f"{path / 'config.json'}: architectures must name a class of transformers "
                         f"{transformers.__version__}, got {names}")  # fmt: skip
    return getattr(transformers, names[0])


def load_model(path: Path) -> nn.Module:
    """With its weights, in the dtype that they are stored in."""
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path}: the model is quantised already")
    model: nn.Module = _class(config, path).from_pretrained(path, dtype="auto", local_files_only=True)
    return model


def empty_model(path: Path) -> nn.Module:
    """As `config.json` describes it, before it was quantised."""
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: nn.Module = _class(config, path)._from_config(config)
    return model


def windows(path: Path, text: str, *, length: int, samples: int, batch_size: int) -> list[dict[str, Tensor]]:
    """The first windows of a text, each `length` tokens of the model's own tokenizer, special tokens included."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    length = min(length, tokenizer.model_max_length)
    found = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
    whole = [ids for ids in found if len(ids) == length][:samples]
    if not whole:
        raise ValueError(f"the calibration text must have at least {length} tokens, got {len(found[0])}")
    return [{"input_ids": torch.tensor(whole[i : i + batch_size])} for i in range(0, len(whole), batch_size)]


def copy_rest(source: Path, target: Path) -> None:
    """Copies what belongs to a model besides weights and configuration: tokenizer, generation settings, licence."""
    for file in source.rglob("*"):
        if file.is_file() and not file.name.endswith(WEIGHTS) and file != source / "config.json":
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
