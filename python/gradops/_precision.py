"""Products in the precision that their dtype, or the caller, names, whatever torch is set to outside.

There are two interfaces for how torch multiplies float32. Since torch 2.9 each backend has a setting of its own, and
torch.get_float32_matmul_precision() raises, or is out of date, once one of those was set. And under torch.autocast
products of float32 are made in 16 bits.
"""
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_fp32_precision_getter as _get
from torch._C import _is_any_autocast_enabled
from torch._C import _set_fp32_precision_setter as _set

_BACKENDS = ("cuda", "mkldnn")
_SETTINGS = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}  # of both
_NAMES = {settings: name for name, settings in _SETTINGS.items()} | {("none", "none"): "highest"}


def _settings() -> tuple[str, str]:
    return _get("cuda", "matmul"), _get("mkldnn", "matmul")


def _older_interface(settings: tuple[str, str]) -> str | None:
    """What it was told, where that is what the backends are set to."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
    return precision if _NAMES.get(settings) == precision else None


def matmul_precision_for(x: Tensor) -> str:
    """"highest", "high" or "medium": how torch is set to make products of float32 on x's device."""
    settings = _settings()
    if (older := _older_interface(settings)) is not None:
        return older
    return {"tf32": "high", "bf16": "medium"}.get(settings[0 if x.is_cuda else 1], "highest")


def matmul_precision(precision: str) -> contextlib.AbstractContextManager[None]:
    """Within, products of float32 are made in this precision, and of nothing in less than its dtype."""
    before = _settings()
    if _NAMES.get(before) == precision:
        return no_autocast()
    return _set_to(precision, before)


@contextlib.contextmanager
def _set_to(precision: str, before: tuple[str, str]) -> Iterator[None]:
    older = _older_interface(before)
    try:
        if older is not None:  # torch has readers of it left, which raise where the newer one disagrees
            torch.set_float32_matmul_precision(precision)
        else:
            for backend, setting in zip(_BACKENDS, _SETTINGS[precision], strict=True):
                _set(backend, "matmul", setting)
        with no_autocast():
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, setting in zip(_BACKENDS, before, strict=True):
            _set(backend, "matmul", "none")  # follows torch.backends.fp32_precision, as it mostly did before
            if _get(backend, "matmul") != setting:
                _set(backend, "matmul", setting)


_nothing = contextlib.nullcontext()


def no_autocast() -> contextlib.AbstractContextManager[Any]:
    if not _is_any_autocast_enabled():
        return _nothing
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast("cpu", enabled=False))
    stack.enter_context(torch.autocast("cuda", enabled=False))
    return stack


def without_autocast(f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def run(*args: Any) -> Any:
        if not _is_any_autocast_enabled():
            return f(*args)
        with no_autocast():
            return f(*args)

    return run
