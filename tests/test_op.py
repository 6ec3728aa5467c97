"""What registration promises for every op: no silent zero derivative, and torch's compilers work."""
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_map

from gradops._op import Function
from gradops.linalg import row_norm

from . import calls

CALLS = {}
for module in pkgutil.iter_modules(calls.__path__):
    CALLS |= importlib.import_module(f"{calls.__name__}.{module.name}").CALLS
INNER = {
    "positive_eigen",  # behind the derivatives of polar and inv_sqrt, which have tests of their own
    "group_index",  # takes and gives integers: nothing to differentiate
}


def where(condition):
    return pytest.mark.parametrize("name", [name for name, call in CALLS.items() if condition(call)])


every_op = where(lambda c: True)
floating_op = where(lambda c: c.floating)
public_op = where(lambda c: c.public)


def raw(name):
    return getattr(torch.ops.gradops, name).default


def test_every_op_is_covered():
    ops = {s.split("::")[1] for s in torch._C._dispatch_get_all_op_names() if s.startswith("gradops::")}
    assert ops - {"isa", "isa_levels"} - INNER == set(CALLS)


@floating_op
def test_raw_op_refuses_a_gradient(name):
    c = CALLS[name]
    with pytest.raises(RuntimeError, match="requires grad"):
        raw(name)(*c.raw(c.example().requires_grad_()))
    with torch.no_grad():
        raw(name)(*c.raw(c.example().requires_grad_()))


def total(y):
    return y.sum() if isinstance(y, torch.Tensor) else sum(t.sum() for t in y if t.is_floating_point())


@floating_op
def test_raw_op_refuses_torch_func(name):
    c = CALLS[name]
    with pytest.raises(RuntimeError, match="requires grad"):
        torch.func.grad(lambda x: total(raw(name)(*c.raw(x))))(c.example())
    with pytest.raises(RuntimeError, match="requires grad"):
        torch.func.vjp(lambda x: total(raw(name)(*c.raw(x))), c.example())


@floating_op
def test_raw_op_refuses_forward_mode(name):
    c = CALLS[name]
    x = c.example()
    with pytest.raises(RuntimeError, match="tangent"):
        torch.func.jvp(lambda x: raw(name)(*c.raw(x)), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="tangent"):
        raw(name)(*c.raw(torch.autograd.forward_ad.make_dual(x, x.clone())))


@where(lambda c: c.public and c.derivatives)
def test_public_function_has_every_derivative(name):
    c = CALLS[name]
    x = c.example()
    x = (x[0, :3, :4] if x.dim() == 3 else x).clone().requires_grad_()
    assert torch.autograd.gradcheck(c.public, (x,), check_forward_ad=True, check_batched_grad=c.vmap)
    if c.derivatives > 1:
        assert torch.autograd.gradgradcheck(c.public, (x,))
    x = x.detach()
    jacobian = torch.func.jacrev(c.public)(x) if c.vmap else torch.autograd.functional.jacobian(c.public, x)
    if c.vmap:
        torch.testing.assert_close(torch.func.jacfwd(c.public)(x), jacobian)
    assert jacobian.abs().max() > 0


@where(lambda c: c.public and c.derivatives > 1)
def test_forward_over_forward_is_refused_not_zero(name):
    c = CALLS[name]
    x = c.example()
    with pytest.raises(RuntimeError, match="forward-mode derivatives of forward-mode"):
        torch.func.jvp(lambda y: torch.func.jvp(c.public, (y,), (x,))[1], (x,), (x,))


@where(lambda c: c.public and c.derivatives == 1)
def test_a_second_derivative_is_refused(name):
    c = CALLS[name]
    x = c.example().requires_grad_()
    grad, = torch.autograd.grad(c.public(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"deriv|differentiat"):
        torch.autograd.grad(grad.sum(), x)


@where(lambda c: c.public and c.derivatives == 0)
def test_public_function_refuses_a_derivative(name):
    c = CALLS[name]
    x = c.example()
    with pytest.raises(RuntimeError, match=r"derivative|detach"):
        c.public(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"derivative|detach"):
        torch.func.jvp(c.public, (x,), (x,))


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@where(lambda c: c.public and c.derivatives)
def test_a_gradient_that_is_undefined_is_zero(name):
    c = CALLS[name]
    x = c.example().requires_grad_()
    grad, = torch.autograd.grad(Cut.apply(c.public(x)).sum(), x, allow_unused=True)
    assert grad is None or not grad.any()


def test_functions_have_no_default_arguments():
    """Their apply does not look for any, neither here nor at a call."""
    seen, pending = [], [Function]
    while pending:
        function = pending.pop()
        pending += function.__subclasses__()
        if "forward" in vars(function):
            seen.append(function)
    assert len(seen) > 20
    for function in seen:
        for p in inspect.signature(function.forward).parameters.values():
            assert p.default is p.empty, f"{function.__module__}.{function.__name__}: {p}"


def test_a_call_reads_no_signature(monkeypatch):
    x = torch.randn(3, 4, requires_grad=True)

    def refuse(*_):
        raise AssertionError("a signature was read")

    with monkeypatch.context() as patch:
        patch.setattr(inspect, "signature", refuse)
        grad, = torch.autograd.grad(row_norm(x).sum(), x)
    expected, = torch.autograd.grad((x / x.norm(dim=-1, keepdim=True)).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_a_tensor_that_outlived_its_transform():
    left = []
    x = torch.randn(3, 4, requires_grad=True)
    torch.func.grad(lambda y: (left.append(y), y.sum())[1])(x)
    grads = [torch.autograd.grad(row_norm(y).square().sum(), x) for y in (x, left[0])]
    torch.testing.assert_close(*grads)


@every_op
def test_opcheck(name):
    c = CALLS[name]
    torch.library.opcheck(raw(name), c.raw(c.example()))


@where(lambda c: c.public and c.vmap)
def test_vmap(name):
    c = CALLS[name]
    x = torch.stack([c.example(), 2 * c.example()[..., torch.randperm(c.example().shape[-1])]])
    for dim in (0, 1):
        want = torch.stack([c.public(t) for t in x.unbind(dim)])
        torch.testing.assert_close(torch.vmap(c.public, in_dims=dim)(x), want)


@public_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(name, dynamic):
    c = CALLS[name]
    torch._dynamo.reset()  # else the lambdas of the other ops count as recompilations of this one
    compiled = torch.compile(lambda x: c.public(x * 2) + 1, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for x in (c.example(), c.example()[:, :4]) if c.example().dim() == 3 else (c.example(),):
        torch.testing.assert_close(compiled(x), c.public(x * 2) + 1)
    if c.derivatives:
        x = c.example().requires_grad_()
        ours, = torch.autograd.grad(compiled(x).sum(), x)
        want, = torch.autograd.grad((c.public(x * 2) + 1).sum(), x)
        torch.testing.assert_close(ours, want)


@where(lambda c: c.public and c.derivatives)
def test_compile_of_forward_mode(name):
    c = CALLS[name]
    torch._dynamo.reset()
    x = c.example()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def tangent(x, direction):
        return torch.func.jvp(c.public, (x,), (direction,))[1]

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")(x, direction)
    torch.testing.assert_close(compiled, tangent(x, direction))


class Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x) * 2


@public_op
def test_export(name):
    c = CALLS[name]
    dynamic = {"x": {0: torch.export.Dim("batch")}} if c.vmap and c.example().dim() == 3 else None
    program = torch.export.export(Module(c.public), (c.example(),), dynamic_shapes=dynamic)
    x = torch.cat([c.example(), c.example() + 1]) if dynamic else c.example() + 1
    torch.testing.assert_close(program.module()(x), c.public(x) * 2)


def test_aot_inductor(tmp_path):
    c = CALLS["row_norm"]
    program = torch.export.export(Module(c.public), (c.example(),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = c.example()
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), c.public(x) * 2)


@where(lambda c: c.own_bits)
def test_results_do_not_depend_on_the_number_of_threads(name):
    c = CALLS[name]
    x = c.large()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = raw(name)(*c.raw(x))
            results.append([y] if isinstance(y, torch.Tensor) else list(y))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for r in results for a, b in zip(r, results[0], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@where(lambda c: c.own_bits)
def test_on_cuda_it_is_captured_and_waits_for_nothing(name):
    c = CALLS[name]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gradops::{name}", "CUDA"):
        pytest.skip("CPU only")

    def outputs(args):
        y = raw(name)(*args)
        return [y] if isinstance(y, torch.Tensor) else list(y or [])

    args = tree_map(lambda a: a.cuda() if isinstance(a, torch.Tensor) else a, c.raw(c.example()))
    outputs(args)  # the first launch loads the kernel
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    for y, want in zip(captured, outputs(c.raw(c.example())), strict=True):
        torch.testing.assert_close(y.cpu(), want, equal_nan=True)


def test_a_level_that_cannot_run_is_an_error():
    code = "import torch, gradops; torch.ops.gradops.isa()"
    done = subprocess.run([sys.executable, "-c", code], env={"GRADOPS_ISA": "v9", "PATH": ""}, capture_output=True,
                          text=True, cwd=pathlib.Path(__file__).parent)
    assert done.returncode != 0 and "GRADOPS_ISA=v9" in done.stderr
