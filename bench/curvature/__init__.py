"""Cases of gradops.curvature, one module per group of ops."""
import pkgutil
from collections.abc import Iterator
from importlib import import_module

from ..harness import Case, Settings


def cases(settings: Settings) -> Iterator[Case]:
    for module in pkgutil.iter_modules(__path__):
        yield from import_module(f"{__name__}.{module.name}").cases(settings)
