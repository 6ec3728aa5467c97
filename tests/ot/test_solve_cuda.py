"""The CUDA solver: a block per problem, one text with the CPU's. On a GPU, and emulated."""
import pytest
import torch

from gradops import ot


def problem(n, m, batch=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    M = torch.rand(*batch, n, m, dtype=torch.float64, generator=g)
    a, b = (torch.rand(*batch, s, dtype=torch.float64, generator=g) + 0.2 for s in (n, m))
    return M, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def both(cuda_backend, M, a, b, k=0, reg=0.3, x=None, y=None, lengths=(None, None), averaged=False, max_iter=300):
    """The same call on the CPU and on CUDA: (alpha, beta, index, weight, report) of each."""
    device, ops = cuda_backend
    there = lambda t: None if t is None else t.to(device)
    tensors = (M, x, y, a, b, None, *lengths)
    width = a.shape[-1] if averaged or not k else k
    settings = (reg, k, 1e-6, 1e-9, max_iter, width, averaged)
    got = ops.solve(*map(there, tensors), *settings)
    return torch.ops.gradops.solve(*tensors, *settings), [t.cpu() for t in got]


def same(want, got, tolerance, unique=True):
    """To rounding: sums over warps are in another order than the CPU's. unique: there is one solution of the dual."""
    assert torch.equal(want[4][..., 6], got[4][..., 6])  # status
    for i in (0, 1, 3) if unique else (3,):
        torch.testing.assert_close(got[i], want[i], rtol=tolerance, atol=tolerance)
    assert torch.equal(want[2], got[2])
    torch.testing.assert_close(got[4][..., :2], want[4][..., :2], rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_quadratic(cuda_backend, dtype):
    M, a, b = problem(6, 5)
    want, got = both(cuda_backend, M.to(dtype), a, b)
    same(want, got, 1e-12)
    assert got[4][3] <= 1e-6 and got[4][6] == 0


def test_long_columns_and_zero_weights(cuda_backend):
    M, a, b = problem(40, 3, seed=1)  # more rows than lanes
    a[5], b[1] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    M[7, 0] = torch.inf
    same(*both(cuda_backend, M, a, b, reg=2.0), 1e-12)


def test_costs_of_48_kilobytes(cuda_backend):
    """In shared memory they are all that a block gets without asking; the kernel has arrays of its own besides."""
    M, a, b = problem(64, 96, seed=1)
    same(*both(cuda_backend, M, a, b, reg=30.0, max_iter=3), 1e-12)


def test_points(cuda_backend):
    _, a, b = problem(7, 6, seed=2)
    g = torch.Generator().manual_seed(3)
    x, y = torch.rand(7, 3, generator=g), torch.rand(6, 3, generator=g)
    same(*both(cuda_backend, None, a, b, x=x, y=y), 1e-11)


@pytest.mark.parametrize("shape,k,seed", [((6, 5), 2, 1), ((5, 5), 1, 0)])
def test_max_nz(cuda_backend, shape, k, seed):
    M, a, b = problem(*shape, seed=seed)
    if shape == (5, 5):  # an assignment
        a, b = torch.full_like(a, 0.2), torch.full_like(b, 0.2)
    want, got = both(cuda_backend, M, a, b, k=k, max_iter=100)
    same(want, got, 1e-6, unique=k > 1)
    weight = got[3]
    torch.testing.assert_close(weight.sum(-1), b, rtol=1e-14, atol=0)
    assert int((weight > 0).sum(-1).max()) <= k


def test_ragged_batch_is_every_problem_alone(cuda_backend):
    M, a, b = problem(6, 5, (3,), seed=4)
    n_len, m_len = torch.tensor([6, 4, 5]), torch.tensor([5, 5, 3])
    for i in range(3):
        a[i, n_len[i]:], b[i, m_len[i]:] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    want, got = both(cuda_backend, M, a, b, lengths=(n_len, m_len))
    same(want, got, 1e-12)
    n, m = int(n_len[1]), int(m_len[1])
    _, alone = both(cuda_backend, M[1, :n, :m].contiguous(), a[1, :n].contiguous(), b[1, :m].contiguous())
    assert torch.equal(alone[0], got[0][1, :n]) and torch.equal(alone[1], got[1][1, :m])
    assert torch.equal(alone[3], got[3][1, :m, :n])


def test_bad_numbers_stay_in_their_problem(cuda_backend):
    """No exception without waiting for the device: the status says it."""
    device, ops = cuda_backend
    M, a, b = problem(4, 3, (4,), seed=5)
    good = M.clone()
    M[0, 1, 1], a[1, 0] = torch.nan, -1
    lengths = torch.tensor([4, 4, 9, 4])
    got = ops.solve(M.to(device), None, None, a.to(device), b.to(device), None, lengths.to(device), None, 0.3, 0, 1e-6,
                    1e-9, 100, 4, False)
    status = [ot.result.STATUS[int(s)] for s in got[4][:, 6]]
    assert status == ["invalid", "invalid", "invalid", "converged"]
    assert got[0][:3].isnan().all() and got[4][:3, 0].isnan().all()
    want = torch.ops.gradops.solve(good[3], None, None, a[3], b[3], None, None, None, 0.3, 0, 1e-6, 1e-9, 100, 4, False)
    torch.testing.assert_close(got[0][3].cpu(), want[0], rtol=1e-12, atol=1e-13)
