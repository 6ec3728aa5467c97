"""Transport plans with few entries per column."""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparsePlan:
    """A plan of a few entries per column: ``T[indices[..., j, r], j] = values[..., j, r]``.

    Every column has the same number of slots; where it needs fewer, the rest have the index 0 and the value 0.

    Attributes:
        indices: ``(..., m, w)``, int64: rows of column j's entries, ascending.
        values: ``(..., m, w)``, float64: their mass.
        shape: ``(..., n, m)`` of the plan.

    Example:
        >>> import torch
        >>> from gradops.ot import SparsePlan
        >>> plan = SparsePlan(torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.25, 0.25], [0.5, 0.0]]), (3, 2))
        >>> plan.to_dense()
        tensor([[0.2500, 0.0000],
                [0.0000, 0.5000],
                [0.2500, 0.0000]])
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def to_dense(self) -> Tensor:
        """``(..., n, m)``; differentiable in ``values``."""
        columns = self.values.new_zeros(*self.shape[:-2], self.shape[-1], self.shape[-2])
        if self.shape[-2] > 0:  # without rows a slot stands for none
            columns = columns.scatter_add(-1, self.indices, self.values)
        return columns.mT.contiguous()

    def to_torch_sparse(self) -> Tensor:
        """The plan as a coalesced COO tensor of its positive entries. Waits for the device."""
        *batch, column, slot = torch.nonzero(self.values, as_tuple=True)
        where = (*batch, column, slot)
        places = torch.stack([*batch, self.indices[where], column])
        return torch.sparse_coo_tensor(places, self.values[where], self.shape, device=self.values.device,
                                       check_invariants=False).coalesce()

    def to_csr(self) -> Tensor:
        """The plan of one problem as a CSR tensor ``(n, m)`` of its positive entries; for SciPy,
        ``scipy.sparse.csr_matrix((t.values(), t.col_indices(), t.crow_indices()), t.shape)``.

        Raises:
            ValueError: the plan is a batch, whose items differ in their number of entries.
        """
        if len(self.shape) != 2:
            raise ValueError(f"to_csr needs the plan of one problem, of shape (n, m), got {self.shape}; take an item, "
                             "SparsePlan(plan.indices[i], plan.values[i], plan.shape[1:])")
        return self.to_torch_sparse().to_sparse_csr()
