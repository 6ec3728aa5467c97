"""Products with the Hessian of a loss."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dual import forward_over_reverse
from ._functions import Gradient, outside_of_graphs, resolve
from ._trees import Tree


@outside_of_graphs
def hvp(f: Any, params: Any, v: Any, *, has_aux: bool = False) -> Any:
    r"""The loss and the product of its Hessian with a vector.

    .. math:: L = f(\theta), \qquad Hv = \nabla_\theta \langle \nabla_\theta f(\theta), v \rangle

    Args:
        f: a function of `params` that returns a loss of one element, in the style of :mod:`torch.func`; or a tuple
            ``(module, loss_fn)``, where ``loss_fn(module)`` returns it.
        params: :math:`\theta`, a tensor or dicts, lists and tuples of tensors (float64, float32, bfloat16, float16),
            whether they require a gradient or not. With a module, a dict from names of its parameters to tensors;
            the other parameters are constants. None takes all of the module's that require a gradient.
        v: a vector, with the structure, shapes and dtypes of `params`.
        has_aux: f returns ``(loss, aux)``, and aux is returned last.

    Returns:
        ``(loss, Hv)``, or ``(loss, Hv, aux)``. Hv has the structure of `params`, and zeros for those that do not
        influence the loss. Nothing that is returned has a graph, apart from aux.

    f is called once, and once more from the start where it calls a function without a forward mode; random numbers are
    then the same, so dropout has one mask: H is the Hessian of the loss with that mask. Buffers of a module (running
    statistics of batch norm) are left as they are. A shared parameter is given once. Results are within rounding of
    torch's; sums in float32 or float64.

    Raises TypeError or ValueError for arguments that do not fit, and for a loss that depends on none of `params`.
    Where an operation of the model has no second derivative (fused attention, `once_differentiable` functions, a
    compiled model), torch's RuntimeError is raised, with the way out if there is one; the result is never a silent
    zero. Under :func:`torch.compile` the call runs outside of the graph, and with ``fullgraph=True`` it is refused.
    Under :func:`second_order_kernels` an ordinary model has fused attention, norms and losses that can do it.

    The vector goes through the forward and the backward pass as the parameters' change. Linear layers and the
    operations of this family have fused passes for that, and the gradient of a linear layer's weight is left out: 8
    forward passes' worth of matrix products, where a gradient takes 3 and other routes 9. Measured are 2.4 gradients'
    time on a small GPT under :func:`second_order_kernels` and 2.5 on a perceptron, and 1.9 and 2.85 times a gradient's
    peak of memory. Double backward takes the rest: what has no fast or safe forward mode (convolutions, group norm,
    functions of somebody else, checkpoints, in-place calls on the result of a linear layer, gradients within f), and
    models of fewer than 65536 parameters, whose time is that of calls. It costs 2.9 gradients' time and 2.6 to 3.2
    times the memory, in models without attention.

    Source: B. Pearlmutter, Fast exact multiplication by the Hessian, 1994.

    Example:
        >>> import torch
        >>> from gradops.curvature import hvp
        >>> x = torch.tensor([1.0, 2.0])
        >>> hvp(lambda x: x[0] ** 2 * x[1], x, torch.tensor([1.0, 0.0]))
        (tensor(2.), tensor([4., 2.]))
    """
    tree, loss, aux, _, product = _product(f, params, v, has_aux, values=False)
    out = loss, tree.build(product)
    return (*out, aux) if has_aux else out


@outside_of_graphs
def grad_and_hvp(f: Any, params: Any, v: Any, *, has_aux: bool = False) -> Any:
    """``(loss, gradient, Hv)``, or ``(loss, gradient, Hv, aux)``: the gradient is on the way of :func:`hvp`.

    Arguments, errors and cost are those of :func:`hvp`.

    Example:
        >>> import torch
        >>> from gradops.curvature import grad_and_hvp
        >>> grad_and_hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.ones(2))
        (tensor(9.), tensor([ 3., 12.]), tensor([ 6., 12.]))
    """
    tree, loss, aux, gradient, product = _product(f, params, v, has_aux, values=True)
    out = loss, tree.build(gradient), tree.build(product)
    return (*out, aux) if has_aux else out


def _product(
    f: Any, params: Any, v: Any, has_aux: bool, values: bool
) -> tuple[Tree, Tensor, Any, list[Tensor], list[Tensor]]:
    function, tree = resolve(f, params)
    vector = tree.vector(v)[0]
    found = forward_over_reverse(function, tree, vector, has_aux, values)
    if found is not None:
        return tree, *found
    g, loss, aux = Gradient.of(function, tree, has_aux, values=values)
    return tree, loss, aux, g.values, g.product(vector, keep=False)


class LinearizedGrad:
    """The gradient of a loss at one point, kept so that products with the Hessian are cheap: see `linearize_grad`."""

    def __init__(self, f: Any, params: Any, has_aux: bool) -> None:
        function, self._params = resolve(f, params)
        self._gradient, self.loss, self.aux = Gradient.of(function, self._params, has_aux, values=True)
        self.grad: Any = self._params.build(self._gradient.values)

    @outside_of_graphs
    def __call__(self, v: Any) -> Any:
        """H v; or, where every leaf of v has a further first axis of k, the k products along such an axis."""
        vectors, count = self._params.vector(v, stacked=True)
        if count is None:
            return self._params.build(self._gradient.product(vectors, keep=True))
        out = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in vectors]
        for k in range(count):  # one by one: vmap would hold k backward passes at once, and is not faster
            for o, h in zip(out, self._gradient.product([t[k] for t in vectors], keep=True), strict=True):
                o[k] = h
        return self._params.build(out)


@outside_of_graphs
def linearize_grad(f: Any, params: Any, *, has_aux: bool = False) -> LinearizedGrad:
    """A function v -> H v that has paid for the forward and the first backward pass: for many vectors.

    What comes back is called with a vector, or with k of them along a first axis of every leaf, and has the attributes
    ``loss``, ``grad`` (with the structure of `params`) and ``aux``. It holds the graphs of both passes until it is
    dropped. The parameters are those of now: change them in place, and a call raises.

    Arguments and errors are those of :func:`hvp`. A product costs two gradients of the model's products.

    Example:
        >>> import torch
        >>> from gradops.curvature import linearize_grad
        >>> H = linearize_grad(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        >>> H(torch.eye(2))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    return LinearizedGrad(f, params, has_aux)
