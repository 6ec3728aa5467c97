"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .router import router

__all__: list[str] = [
    "router",
]  # fmt: skip
