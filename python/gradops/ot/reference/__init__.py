"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""

__all__: list[str] = [
]  # fmt: skip
