"""Linear layers as quantisation sees them: a weight (out, in), and a place in a model."""
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .quantized_linear import QuantizedLinear


def is_layer(module: nn.Module) -> bool:
    """Whether the module can be quantised: exactly a Linear, or the transposed one of GPT-2 (transformers' Conv1D)."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def weight_of(module: nn.Module) -> Tensor:
    """(out, in), sharing memory with the module."""
    weight: Tensor = module.weight.detach()  # type: ignore[assignment, operator]
    return weight if type(module) is nn.Linear else weight.T


def layer_of(tensors: Mapping[str, Tensor], bits: int, group_size: int, checkpoint_format: str) -> QuantizedLinear:
    """The layer that holds these tensors of a checkpoint, without copying them."""
    with torch.device("meta"):
        layer = QuantizedLinear(tensors["g_idx"].numel(), tensors["qweight"].shape[-1], "bias" in tensors, bits=bits,
                                group_size=group_size, checkpoint_format=checkpoint_format)  # fmt: skip
    layer.load_state_dict(tensors, assign=True)
    return layer


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of the one of that name."""
    parent, _, own = name.rpartition(".")
    layer.train(model.training)
    setattr(model.get_submodule(parent), own, layer)
