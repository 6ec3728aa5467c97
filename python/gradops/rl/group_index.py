"""Labels to dense group numbers. On a device this is put together from torch's sort and scatters: no .cu of its own."""
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_integers
from .._compiler import allow_in_graph
from .._op import register


def _fake(labels):
    places = torch.library.get_ctx().new_dynamic_size(min=1)  # the number of groups + 1: must be a size as it is
    return torch.empty_like(labels), torch.empty_like(labels), labels.new_empty(places)


_op = register("group_index", fake=_fake, vmap=False)


def _on_device(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = labels.shape[0]
    values, inverse, sizes = torch.unique(labels, return_inverse=True, return_counts=True)  # waits for the device
    first = torch.full_like(values, n).scatter_reduce_(0, inverse, torch.arange(n, device=labels.device), "amin")
    by_first = torch.argsort(first)
    rank = torch.empty_like(by_first).scatter_(0, by_first, torch.arange(len(by_first), device=labels.device))
    ids = rank[inverse]
    offsets = torch.cat([sizes.new_zeros(1), sizes[by_first].cumsum(0)])
    return ids, torch.argsort(ids, stable=True), offsets


@allow_in_graph
def group_index(labels: Tensor | Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers the distinct labels 0, 1, ... in order of first appearance.

    Args:
        labels: ``(N,)``, int64 or int32, any values: negative, sparse, shuffled. Or a sequence of ``N`` strings
            (such as the ``uid`` column of verl), numbered on the CPU by a dictionary.

    Returns:
        ``(ids, perm, offsets)``, int64: ``ids[i]`` is the number of ``labels[i]``; ``perm`` lists the items group by
        group, each group's in their order; group ``g`` is ``perm[offsets[g]:offsets[g + 1]]``.

    Raises:
        TypeError: ``labels`` is neither an integer tensor nor a sequence of strings.
        ValueError: ``labels`` is not 1-D.

    Linear in ``N`` on CPU, whatever the labels' range: a table where it is small, a hash table elsewhere, then a
    counting sort. On CUDA it is made of torch's sorts and waits for the device, since the number of groups is the
    shape of a result; :func:`group_advantages` takes the labels themselves and does not wait.

    Example:
        >>> import torch
        >>> from gradops.rl import group_index
        >>> group_index(torch.tensor([7, -3, 7, 10**9]))
        (tensor([0, 1, 0, 2]), tensor([0, 2, 1, 3]), tensor([0, 2, 3, 4]))
        >>> group_index(["b", "a", "b"])[0]
        tensor([0, 1, 0])
    """
    if not isinstance(labels, Tensor):
        if isinstance(labels, str) or (not isinstance(labels, Sequence) and not hasattr(labels, "tolist")):
            raise TypeError(f"labels must be an integer tensor or a sequence of strings, got {type(labels).__name__}")
        known: dict[str, int] = {}
        numbers = [known.setdefault(label, len(known)) for label in labels]
        if not all(isinstance(label, str) for label in known):
            raise TypeError("labels must be strings, or a tensor of integers")
        return _op(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    check_integers(labels, "labels")
    if labels.dim() != 1:
        raise ValueError(f"labels must have 1 dimension, got shape {tuple(labels.shape)}")
    labels = labels.long()
    return _on_device(labels) if labels.is_cuda else _op(labels)
