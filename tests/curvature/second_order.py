"""What every operation with kernels of two orders promises, against plain torch. Costs a fraction of a second."""
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap

Function = Callable[..., Tensor]


def check_second_order(op: Function, reference: Function, inputs: Sequence[Tensor], *, atol: float = 1e-12,
                       rtol: float = 1e-9) -> None:
    """Both are functions of the inputs alone (arguments without a derivative are closed over), which are float64 and
    tiny: whole Hessians are made. Derivatives of both orders are compared with those that torch has of `reference`, in
    every nesting of forward and reverse mode, for all inputs and for one at a time, batched by vmap and on strides."""
    x = [t.detach() for t in inputs]
    random = torch.Generator().manual_seed(7)
    v, w = ([torch.randn(t.shape, dtype=t.dtype, generator=random) for t in x] for _ in range(2))
    same = partial(torch.testing.assert_close, atol=atol, rtol=rtol)

    same(op(*x), reference(*x))
    points = [t.clone().requires_grad_() for t in x]
    assert gradcheck(op, points, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(op, points, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)
    for name, nesting in _nestings(len(x)).items():
        try:
            same(nesting(op, x, v, w), nesting(reference, x, v, w))
        except Exception as error:  # say which
            raise AssertionError(f"{name}: {error}") from error
    for graph in (False, True):
        same(_dual(op, x, v, graph), _dual(reference, x, v, graph), msg=lambda m: f"raw forward mode over reverse: {m}")


def curved(f: Function, *x: Tensor) -> Tensor:
    """A loss whose gradient in f's result changes with it, and differs from number to number."""
    return f(*x).sin().sum()


def linear(f: Function, *x: Tensor) -> Tensor:
    """One whose gradient in f's result is a constant, of stride 0."""
    return f(*x).sum()


def _nestings(n: int) -> dict[str, Callable[..., object]]:
    every = tuple(range(n))

    def along(f, x, v, chosen):  # f as a function of some inputs, those, and their changes
        def g(*some):
            full = list(x)
            for i, t in zip(chosen, some, strict=True):
                full[i] = t
            return f(*full)

        return g, tuple(x[i] for i in chosen), tuple(v[i] for i in chosen)

    def jvp_grad(loss, chosen, f, x, v, w):
        return jvp(*along(grad(partial(loss, f), every), x, v, chosen))[1]

    def grad_jvp(chosen, f, x, v, w):
        return grad(lambda *x: jvp(*along(partial(curved, f), x, v, chosen))[1], every)(*x)

    def grad_grad(loss, chosen, f, x, v, w):  # double backward, of some gradients alone
        def product(*x):
            grads = grad(partial(loss, f), chosen)(*x)
            return sum((g * v[i]).sum() for g, i in zip(grads, chosen, strict=True))

        return grad(product, every)(*x)

    def strided(f, x, v, w):
        x, v = ([_spread_out(t) for t in ts] for ts in (x, v))
        return jvp(grad(partial(curved, f), every), tuple(x), tuple(v))[1]

    def batch_of_changes(f, x, v, w):
        at = grad(partial(curved, f), every)
        return vmap(lambda *v: jvp(at, tuple(x), v)[1])(*(torch.stack(pair) for pair in zip(v, w, strict=True)))

    def batch_of_inputs(chosen, f, x, v, w):
        dims = tuple(-1 if i in chosen and t.dim() else 0 if i in chosen else None for i, t in enumerate(x))
        x = [t if d is None else torch.stack([t, t + 0.1 * u], d) for t, u, d in zip(x, v, dims, strict=True)]
        return vmap(grad(partial(curved, f), every), dims)(*x)

    ones = [(f"{i}", (i,)) for i in every] if n > 1 else []
    some = [*ones, ("all", every)]
    return {
        **{f"jvp of grad, changes of {s}": partial(jvp_grad, curved, c) for s, c in some},
        "jvp of grad, linear loss": partial(jvp_grad, linear, every),
        **{f"grad of jvp, changes of {s}": partial(grad_jvp, c) for s, c in some},
        **{f"grad of grad, gradients of {s}": partial(grad_grad, curved, c) for s, c in some},
        "grad of grad, linear loss": partial(grad_grad, linear, every),
        "jvp of grad, strided inputs": strided,
        "vmap of jvp of grad": batch_of_changes,
        **{f"vmap of grad, batches of {s}": partial(batch_of_inputs, c) for s, c in some},
        "hessian": lambda f, x, v, w: hessian(partial(linear, f), every)(*x),
        "jacrev of jacrev": lambda f, x, v, w: jacrev(jacrev(partial(linear, f), every), every)(*x),
    }  # fmt: skip


def _dual(f: Function, x: Sequence[Tensor], v: Sequence[Tensor], graph: bool) -> list[Tensor]:
    """A backward pass inside raw forward mode: the changes of the gradients."""
    points = [t.clone().requires_grad_() for t in x]
    with forward_ad.dual_level():
        loss = curved(f, *map(forward_ad.make_dual, points, v))
        grads = torch.autograd.grad(loss, points, create_graph=graph)
        return [forward_ad.unpack_dual(g).tangent.detach().clone() for g in grads]


def _spread_out(t: Tensor) -> Tensor:
    """The same numbers, transposed in memory with gaps between them."""
    if t.dim() == 0:
        return t
    out = t.new_full((*t.shape[::-1], 2), torch.nan)[..., 0].permute(*reversed(range(t.dim())))
    return out.copy_(t)
