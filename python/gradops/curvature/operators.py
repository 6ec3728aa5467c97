"""Products as an operator of SciPy."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._trees import template
from ._vectors import flat, unflat


def as_linear_operator(matvec: Callable[[Any], Any], like: Any = None) -> Any:
    """A symmetric :class:`scipy.sparse.linalg.LinearOperator` on flattened vectors, for `eigsh`, `cg` and the rest.

    Args:
        matvec, like: as of :func:`gradops.curvature.lanczos`. The leaves of a vector follow each other in the order of
            `like`, each in row-major order, as in :func:`torch.nn.utils.parameters_to_vector`; its dtype is the widest
            of theirs, at least float32. Vectors are copied to the device of `like` and back.

    Raises ImportError without SciPy. Operators of curvlinops work the other way round: ``lambda v: op @ v`` is a matvec
    for the functions of this module, with the ``like`` of their parameters.

    Example:
        >>> import torch
        >>> from gradops.curvature import as_linear_operator
        >>> from scipy.sparse.linalg import eigsh
        >>> A = as_linear_operator(lambda v: torch.arange(10.0) * v, like=torch.zeros(10))
        >>> round(float(eigsh(A, k=1, return_eigenvectors=False)[0]), 4)
        9.0
    """
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

    tree = template(matvec, like, "as_linear_operator")
    size, device = sum(t.numel() for t in tree.tensors), tree.tensors[0].device
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tree.tensors) else torch.float32

    def product(x: Any) -> Any:
        v = torch.as_tensor(np.ascontiguousarray(x).reshape(-1), device="cpu").to(device, dtype)
        return flat(matvec(unflat(v, tree)), tree).to(dtype).cpu().numpy()

    numpy_dtype = np.dtype(str(dtype).removeprefix("torch."))
    return LinearOperator((size, size), matvec=product, rmatvec=product, dtype=numpy_dtype)
