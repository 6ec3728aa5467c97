"""The Sylvester equation H X + X H = R for symmetric H, which the derivatives of matrix roots and polar factors solve.

With H = Q diag(h) Q^T the solution divides by h_i + h_j, never by a difference: coinciding eigenvalues do no harm.
Its own derivative solves the same equation, so it exists to any order.
"""
from typing import Any

import torch
from torch import Tensor

from .._op import Function, _library, primals, register

_library.define("positive_eigen(Tensor h, float tolerance, str what) -> (Tensor, Tensor)")


@torch.library.impl(_library, "positive_eigen", "CompositeExplicitAutograd")
def _positive_eigen(h: Tensor, tolerance: float, what: str) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(h).all(-1).all(-1)[..., None, None]
    values, q = torch.linalg.eigh(torch.where(finite, h, 0))
    values = torch.where(finite[..., 0], values, torch.nan)
    if values.numel():
        singular = values[..., 0] <= tolerance * values[..., -1]
        if h.is_cuda:  # asserted on the device: reading it here would wait for the stream
            torch._assert_async(~singular.any(), what)
        elif bool(singular.any()):
            raise RuntimeError(what)
    return values, q


positive_eigen = register("positive_eigen", fake=lambda h, tolerance, what: (
    h.new_empty(h.shape[:-1]), torch.empty_like(h, memory_format=torch.contiguous_format)))


class Sylvester(Function):
    """X of H X + X H = R; h, q are the eigenvalues and eigenvectors of H, which carry no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(H: Tensor, R: Tensor, h: Tensor, q: Tensor) -> Tensor:
        return q @ ((q.mT @ R @ q) / (h[..., :, None] + h[..., None, :])) @ q.mT

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        H, _, h, q = inputs
        ctx.save_for_backward(H, output, h, q)
        ctx.save_for_forward(H, output, h, q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        H, X, h, q = ctx.saved_tensors
        gR = Sylvester.apply(H, grad, h, q)
        return -(gR @ X.mT + X.mT @ gR), gR, None, None

    @staticmethod
    def jvp(ctx: Any, dH: Tensor | None, dR: Tensor | None, *_):
        H, X, h, q = primals(ctx.saved_tensors)
        right = torch.zeros_like(X) if dR is None else dR
        return Sylvester.apply(H, right if dH is None else right - dH @ X - X @ dH, h, q)
