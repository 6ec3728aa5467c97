"""What registration promises for every op: no silent zero derivative, and torch's compilers work."""
import pathlib
import subprocess
import sys

import pytest
import torch

from gradops import linalg

COEFFICIENTS = [2.0, -1.5, 0.5] * 3
# One call of every op: its raw arguments and the public function around it.
KERNELS = {
    "row_norm": (lambda x: (x, 1e-8, True), lambda x: linalg.row_norm(x, center=True)),
    "nuclear_scale": (lambda x: (x, x + 1), lambda x: linalg.nuclear_scale(x, x + 1)),
    "newton_schulz": (lambda x: (x, COEFFICIENTS, True, 0), lambda x: linalg.newton_schulz(x, 3)),
}


def spd(x):
    return x @ x.mT + torch.eye(x.shape[-2], dtype=x.dtype)


# Ops that orchestrate torch's own: their bits are torch's.
CALLS = KERNELS | {
    "polar": (lambda x: (x, "right", "auto", True, "highest"), lambda x: linalg.polar(x)[0]),
    "inv_sqrt": (lambda x: (spd(x), 0.0), lambda x: linalg.inv_sqrt(spd(x))),
    "one_sided_factor": (lambda x: (x.mT, 1e-8), lambda x: linalg.one_sided_polar(x.mT)),
}
every_op = pytest.mark.parametrize("name", CALLS)


def raw(name):
    return getattr(torch.ops.gradops, name).default


def example():
    return torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_every_op_is_covered():
    ops = {s.split("::")[1] for s in torch._C._dispatch_get_all_op_names() if s.startswith("gradops::")}
    inner = {"positive_eigen"}  # behind the derivatives of polar and inv_sqrt, which have tests of their own
    assert ops - {"isa", "isa_levels"} - inner == set(CALLS)


@every_op
def test_raw_op_refuses_a_gradient(name):
    arguments, _ = CALLS[name]
    with pytest.raises(RuntimeError, match="requires grad"):
        raw(name)(*arguments(example().requires_grad_()))
    with torch.no_grad():
        raw(name)(*arguments(example().requires_grad_()))


@every_op
@pytest.mark.parametrize("transform", [
    lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
    lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x))),
])
def test_raw_op_refuses_torch_func(name, transform):
    arguments, _ = CALLS[name]
    with pytest.raises(RuntimeError, match="requires grad"):
        transform(lambda x: raw(name)(*arguments(x)), example())


@every_op
def test_raw_op_refuses_forward_mode(name):
    arguments, _ = CALLS[name]
    with pytest.raises(RuntimeError, match="tangent"):
        torch.func.jvp(lambda x: raw(name)(*arguments(x)), (example(),), (example(),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="tangent"):
        raw(name)(*arguments(torch.autograd.forward_ad.make_dual(example(), example())))


@every_op
def test_public_function_has_every_derivative(name):
    _, f = CALLS[name]
    x = example()[0, :3, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (x,))
    x = x.detach()
    jacobian = torch.func.jacrev(f)(x)
    torch.testing.assert_close(torch.func.jacfwd(f)(x), jacobian)
    assert jacobian.abs().max() > 0


@every_op
def test_opcheck(name):
    arguments, _ = CALLS[name]
    torch.library.opcheck(raw(name), arguments(example()))


@every_op
def test_vmap(name):
    _, f = CALLS[name]
    x = torch.stack([example(), 2 * example()[:, :, torch.randperm(7)]])
    for dim in (0, 1):
        want = torch.stack([f(t) for t in x.unbind(dim)])
        torch.testing.assert_close(torch.vmap(f, in_dims=dim)(x), want)


@every_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(name, dynamic):
    _, f = CALLS[name]
    torch._dynamo.reset()  # else the lambdas of the other ops count as recompilations of this one
    compiled = torch.compile(lambda x: f(x * 2) + 1, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for x in (example(), example()[:, :4]):
        torch.testing.assert_close(compiled(x), f(x * 2) + 1)
    x = example().requires_grad_()
    ours, = torch.autograd.grad(compiled(x).sum(), x)
    want, = torch.autograd.grad((f(x * 2) + 1).sum(), x)
    torch.testing.assert_close(ours, want)


class Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x) * 2


@every_op
def test_export(name):
    _, f = CALLS[name]
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Module(f), (example(),), dynamic_shapes=dynamic)
    x = torch.cat([example(), example() + 1])
    torch.testing.assert_close(program.module()(x), f(x) * 2)


def test_aot_inductor(tmp_path):
    f = CALLS["row_norm"][1]
    program = torch.export.export(Module(f), (example(),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = example()
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), f(x) * 2)


@pytest.mark.parametrize("name", KERNELS)
def test_results_do_not_depend_on_the_number_of_threads(name):
    arguments, _ = CALLS[name]
    x = torch.randn(3, 300, 257, generator=torch.Generator().manual_seed(1))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(raw(name)(*arguments(x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_a_level_that_cannot_run_is_an_error():
    code = "import torch, gradops; torch.ops.gradops.isa()"
    done = subprocess.run([sys.executable, "-c", code], env={"GRADOPS_ISA": "v9", "PATH": ""}, capture_output=True,
                          text=True, cwd=pathlib.Path(__file__).parent)
    assert done.returncode != 0 and "GRADOPS_ISA=v9" in done.stderr
