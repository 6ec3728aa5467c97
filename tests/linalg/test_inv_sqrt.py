import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from gradops.linalg import inv_sqrt, reference


@pytest.fixture(autouse=True, scope="module")
def products_for_small_ones_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["gradops.linalg.inv_sqrt"], "SMALL", 0)
        yield


def positive(*shape, seed=0):
    x = torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT / max(1, x.shape[-1])


@settings(max_examples=40, deadline=None)
@given(batch=st.lists(st.integers(0, 3), max_size=2), n=st.integers(0, 9), eps=st.sampled_from([0.0, 0.1]),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_any_shape(batch, n, eps, dtype):
    a = (positive(*batch, n, n) + 0.2 * torch.eye(n)).to(dtype)
    before = a.clone()
    s = inv_sqrt(a, eps=eps)
    assert s.shape == a.shape and s.dtype == dtype and torch.equal(a, before)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(s.double(), reference.inv_sqrt(a.double(), eps=eps), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("power", [-90, 90])
def test_scale(power):
    a = positive(3, 8, 8).float()
    torch.testing.assert_close(inv_sqrt(a * 2.0**power) * 2.0**(power / 2), inv_sqrt(a))


def test_items_without_a_root_are_nan_alone():
    a = positive(4, 5, 5)
    a[0], a[1, 2, 1], a[2] = 0, math.nan, -a[2]
    s = inv_sqrt(a)
    assert s[:3].isnan().all()
    torch.testing.assert_close(s[3], reference.inv_sqrt(a[3]))


def symmetric(x):
    return (x + x.mT) / 2


def test_derivatives():
    f = lambda a: inv_sqrt(symmetric(a), eps=0.1)
    for a in (positive(2, 4, 4), torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 1, 4]).double())):
        a.requires_grad_()
        assert gradcheck(f, (a,), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, (a,), check_fwd_over_rev=True)


def test_transforms_compile_and_export():
    class Model(torch.nn.Module):
        def forward(self, x):
            return inv_sqrt(x)

    a = positive(3, 4, 4)
    loss = lambda x: inv_sqrt(x).sin().sum()
    want = torch.func.grad(loss)(a)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(a), want)
    torch.testing.assert_close(torch.export.export(Model(), (a,)).module()(a), inv_sqrt(a))
    b = a.clone().requires_grad_()
    got, = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(b), b)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("a, options, error, words", [
    ("a", {}, TypeError, "A must be a torch.Tensor"),
    (torch.ones(3), {}, ValueError, "A must have at least 2 dimensions"),
    (torch.ones(3, 4), {}, ValueError, "A must be square"),
    (torch.ones(3, 3, dtype=torch.int64), {}, TypeError, "A must be float64"),
    (torch.ones(3, 3, dtype=torch.complex64), {}, TypeError, "A must be float64"),
    (torch.ones(3, 3).to_sparse(), {}, TypeError, "A must be a dense tensor"),
    (torch.ones(3, 3), {"eps": -1.0}, ValueError, "eps must not be negative"),
])
def test_bad_input(a, options, error, words):
    with pytest.raises(error, match=words):
        inv_sqrt(a, **options)
