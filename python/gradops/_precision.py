"""How torch multiplies float32, by whichever of its two interfaces it was told.

Since torch 2.9 each backend has a setting of its own, and torch.get_float32_matmul_precision() raises, or is out of
date, once one of those was set.
"""
import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_SETTINGS = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}  # of both


def _settings() -> tuple[str, ...]:
    return tuple(backend.fp32_precision for backend in _BACKENDS)


def _are(settings: tuple[str, ...], precision: str) -> bool:
    return tuple("ieee" if s == "none" else s for s in settings) == _SETTINGS[precision]


def _older_interface() -> str | None:
    """What it was told, where nothing was told to the newer one since."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
    return precision if _are(_settings(), precision) else None


def matmul_precision_for(x: Tensor) -> str:
    """"highest", "high" or "medium": how products of float32 are made on x's device."""
    if (older := _older_interface()) is not None:
        return older
    cuda, cpu = _settings()
    return {"tf32": "high", "bf16": "medium"}.get(cuda if x.is_cuda else cpu, "highest")


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = _settings()
    if _are(before, precision):
        yield
        return
    older = _older_interface()
    try:
        if older is not None:  # torch has readers of it left, which raise where the newer one disagrees
            torch.set_float32_matmul_precision(precision)
        else:
            for backend, setting in zip(_BACKENDS, _SETTINGS[precision], strict=True):
                backend.fp32_precision = setting
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, setting in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = "none"  # follows torch.backends.fp32_precision, as it mostly did before
            if backend.fp32_precision != setting:
                backend.fp32_precision = setting
