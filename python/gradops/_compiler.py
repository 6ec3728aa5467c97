"""What torch.compile is to know of functions, told when something imports it.

torch.compiler's own decorators import torch._dynamo at once, which takes about as long as to import torch.
"""
import functools
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_NAME = "torch._dynamo"
_untold: list[Callable[[], Any]] = []


class _Watch(importlib.abc.MetaPathFinder):
    """Calls what is in _untold after the module has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _NAME:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((s for s in specs if s is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                while _untold:
                    _untold.pop()()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _tell(what: Callable[[], Any]) -> None:
    if _NAME in sys.modules:
        what()
        return
    if not _untold:
        sys.meta_path.insert(0, _Watch())
    _untold.append(what)


def allow_in_graph(f: F) -> F:
    """torch.compiler.allow_in_graph"""
    _tell(lambda: torch.compiler.allow_in_graph(f))
    return f


def disable(f: F, *, reason: str) -> F:
    """torch.compiler.disable"""
    run: list[Callable[..., Any]] = [f]

    def replace() -> None:
        run[0] = torch.compiler.disable(f, reason=reason)  # type: ignore[no-untyped-call]

    @functools.wraps(f)
    def outside(*args: Any, **kwargs: Any) -> Any:
        return run[0](*args, **kwargs)

    _tell(replace)
    return outside  # type: ignore[return-value]
