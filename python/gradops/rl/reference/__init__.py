"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .scans import discounted_returns, gae, lambda_returns, vtrace

__all__ = ["discounted_returns", "gae", "lambda_returns", "vtrace"]
