"""HARPG and NPGIGT against their recursions written plainly in float64, and what users of torch.optim rely on."""
import copy
import io

import pytest
import torch

from gradops.optim import HARPG, NPGIGT


def quadratic(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=g, dtype=torch.float64)
    return A @ A.mT / n + torch.eye(n, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)


def split(x):
    return [x[:2].clone(), x[2:].clone().view(2, 2)]


def join(xs):
    return torch.cat([x.detach().reshape(-1) for x in xs])


def noise(t):
    return 0.1 * torch.randn(6, generator=torch.Generator().manual_seed(100 + t), dtype=torch.float64)


def set_grads(params, g):
    for p, part in zip(params, split(g), strict=True):
        p.grad = part.to(p.dtype)


def run(opt, params, A, x0, steps=6, start=0, names=None):
    """Noisy gradients of a quadratic, at the points where the method wants them."""
    sign = -1 if opt.param_groups[0]["maximize"] else 1
    for t in range(start, start + steps):
        if isinstance(opt, NPGIGT):
            with opt.extrapolate():
                set_grads(params, sign * (A @ (join(params).double() - x0) + noise(t)))
            opt.step()
            continue
        with opt.interpolate() as change:
            point = join(params).double()
            delta = join(change.values() if names else change).double()
            # A Hessian that depends on the point, so that b matters.
            exact = split(sign * (A @ delta + 0.1 * point * delta))
            product = [h.to(p.dtype) for h, p in zip(exact, params, strict=True)]
        set_grads(params, sign * (A @ (join(params).double() - x0) + noise(t)))
        opt.step(hvp=dict(zip(names, product, strict=True)) if names else product)
    return join(params)


def transcription(cls, A, x0, x, lr, eta, normalize, decay, steps, seed=7):
    g = torch.Generator().manual_seed(seed)
    old, d = x, None
    for t in range(steps):
        r = 2 / (t + 2) if decay else 1
        e = eta * (r**0.8 if cls is NPGIGT else r)
        gamma = lr * (r if normalize else r**0.5)
        b = torch.rand((), dtype=torch.float64, generator=g)
        if cls is NPGIGT:
            gradient = A @ (x + (1 - e) / e * (x - old) - x0) + noise(t)
            d = gradient if d is None else (1 - e) * d + e * gradient
        else:
            gradient, delta, hat = A @ (x - x0) + noise(t), x - old, b * x + (1 - b) * old
            d = gradient if d is None else (1 - e) * (d + A @ delta + 0.1 * hat * delta) + e * gradient
        old, x = x, x - gamma * (d / d.norm() if normalize else d)
    return x


def make(cls, params, **settings):
    extra = {"generator": torch.Generator().manual_seed(7)} if cls is HARPG else {}
    return cls(params, **settings, **extra)


@pytest.mark.parametrize("cls", [HARPG, NPGIGT])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", [True, False])
def test_recursion(cls, normalize, decay):
    A, x0 = quadratic()
    start = torch.ones(6, dtype=torch.float64)
    for dtype, maximize, tolerance in ((torch.float64, False, 1e-12), (torch.float64, True, 1e-12),
                                       (torch.float32, False, 1e-5)):
        params = [torch.nn.Parameter(p.to(dtype)) for p in split(start)]
        settings = {"lr": 0.05, "eta": 0.5, "normalize": normalize, "decay": decay}
        got = run(make(cls, params, maximize=maximize, **settings), params, A, x0)
        want = transcription(cls, A, x0, start, steps=6, **settings)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


def test_transport_is_exact_on_a_quadratic():
    A, x0 = quadratic()
    for cls in (HARPG, NPGIGT):
        x = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
        opt = make(cls, [x], lr=0.1, eta=0.3)
        for _ in range(8):
            before = A @ (x.detach() - x0)
            if cls is NPGIGT:
                with opt.extrapolate():
                    x.grad = A @ (x.detach() - x0)
                opt.step()
            else:
                with opt.interpolate() as (change,):
                    product = A @ change
                x.grad = before.clone()
                opt.step(hvp=[product])
            torch.testing.assert_close(opt.state[x]["momentum_buffer"], before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [HARPG, NPGIGT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_come_back_bit_for_bit(cls, dtype):
    A, x0 = quadratic()
    params = [torch.nn.Parameter(p) for p in split(torch.ones(6).to(dtype))]
    opt = make(cls, params, lr=0.1, eta=0.5)
    run(opt, params, A, x0, steps=3)
    before = [p.detach().clone() for p in params]
    move = opt.interpolate if cls is HARPG else opt.extrapolate
    with pytest.raises(KeyError), move():
        assert not all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(set(s) == {"momentum_buffer", "scale"} and s["scale"].numel() == 1 for s in opt.state.values())
    assert all(t.dtype == torch.float32 for s in opt.state.values() for t in s.values())
    with move(), pytest.raises(RuntimeError, match="do not nest"), move():
        pass
    with move(), pytest.raises(RuntimeError, match="after the `with` block"):
        opt.step(**({"hvp": before} if cls is HARPG else {}))


@pytest.mark.parametrize("cls", [HARPG, NPGIGT])
def test_checkpoint_copy_and_scheduler(cls):
    A, x0 = quadratic()
    params = [torch.nn.Parameter(p) for p in split(torch.ones(6))]
    opt = make(cls, params, lr=torch.tensor(0.1), eta=0.5, normalize=False)
    run(opt, params, A, x0, steps=3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(cls, twins)
    other.load_state_dict(state_dict=torch.load(file))
    if cls is HARPG:
        other.generator.set_state(opt.generator.get_state())
    copied = copy.deepcopy(opt.state_dict())
    assert torch.equal(run(opt, params, A, x0, start=3), run(other, twins, A, x0, start=3))
    assert copied["param_groups"][0]["step"] == 3
    x = torch.nn.Parameter(torch.ones(6))
    opt = make(cls, [x], lr=0.1, decay=False)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for k in range(3):
        before, x.grad = x.detach().clone(), torch.ones(6)
        opt.step(**({"hvp": [torch.zeros(6)]} if cls is HARPG else {}))
        assert abs((x.detach() - before).norm() - 0.1 * 0.5**k) < 1e-6
        schedule.step()


def test_named_parameters_and_groups():
    A, x0 = quadratic()
    plain, named = ([torch.nn.Parameter(p) for p in split(torch.ones(6).double())] for _ in range(2))
    a = run(make(HARPG, [{"params": plain[:1]}, {"params": plain[1:]}]), plain, A, x0)
    b = run(make(HARPG, list(zip("uv", named, strict=True))), named, A, x0, names="uv")
    assert torch.equal(a, b)


def test_a_parameter_without_gradient_stays():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = NPGIGT([a, b], lr=0.1, eta=0.5)
    a.grad = b.grad = torch.ones(2)
    opt.step()
    kept, b.grad = b.detach().clone(), None
    opt.step()
    with opt.extrapolate():
        assert torch.equal(b, kept)  # it did not move, so there is nothing to extrapolate
    assert torch.equal(b, kept) and not torch.equal(a, kept)
    zero = torch.nn.Parameter(torch.ones(2))
    opt, zero.grad = NPGIGT([zero]), torch.zeros(2)
    opt.step()
    assert torch.equal(zero, torch.ones(2))


def test_parameters_and_gradients_of_any_layout():
    """A gradient need not lie in memory as its parameter does, nor the parameter without gaps."""
    A, x0 = quadratic()
    plain, odd = ([torch.nn.Parameter(p) for p in split(torch.ones(6))] for _ in range(2))
    odd[1] = torch.nn.Parameter(torch.ones(2, 6)[:, ::3])
    assert not odd[1].is_contiguous()
    want = run(make(HARPG, plain), plain, A, x0)
    assert torch.equal(run(make(HARPG, odd), odd, A, x0), want)
    odd[1].grad = odd[1].grad.T.contiguous().T
    opt, version = NPGIGT(odd), odd[1]._version
    opt.step()
    assert odd[1]._version > version  # a graph of the old numbers will refuse to go on


def test_closures():
    x = torch.nn.Parameter(torch.ones(3))
    opt, seen = NPGIGT([x], lr=0.1, eta=0.5), []

    def closure():
        seen.append(x.detach().clone())
        opt.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    opt.step(closure)
    first = x.detach().clone()
    assert opt.step(closure) < 3 and not torch.equal(seen[1], first)  # ahead of the parameters
    y = torch.nn.Parameter(torch.ones(3))
    harpg = HARPG([y], lr=0.1)

    def at_the_point():
        (y**2).sum().backward()
        return 1.5

    assert harpg.step(at_the_point) == 1.5


def test_refusals():
    x = torch.nn.Parameter(torch.ones(3))
    for cls in (HARPG, NPGIGT):
        for settings, message in (({"lr": -1.0}, "lr must be >= 0"), ({"eta": 0.0}, r"eta must be in \(0, 1\]"),
                                  ({"eta": 1.5}, r"eta must be in \(0, 1\]")):
            with pytest.raises(ValueError, match=message):
                cls([x], **settings)
        with pytest.raises(ValueError, match="normalize must be the same in every group"):
            cls([{"params": [x]}, {"params": [torch.nn.Parameter(torch.ones(1))], "normalize": False}])
        with pytest.raises(TypeError, match="real and floating-point"):
            cls([torch.ones(2, dtype=torch.complex64)])
    opt = HARPG([x])
    x.grad = torch.ones(3)
    opt.step()
    with pytest.raises(ValueError, match="hvp must be given after the first step"):
        opt.step()
    with pytest.raises(TypeError, match="hvp must be a list"):
        opt.step(hvp={"x": x})
    with pytest.raises(ValueError, match=r"hvp\[0\] must have shape \(3,\), got \(2,\)"):
        opt.step(hvp=[torch.ones(2)])
    with pytest.raises(ValueError, match="one tensor for each of 1 parameters, got 2"):
        opt.step(hvp=[torch.ones(3)] * 2)


def test_dtensor():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Replicate(), Shard(0)):
            plain = [torch.nn.Parameter(torch.ones(4, 2)) for _ in range(2)]
            placed = [torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [placement])),
                      torch.nn.Parameter(torch.ones(4, 2))]
            reference, opt = NPGIGT(plain, eta=0.5), NPGIGT(placed, eta=0.5)
            for step in range(3):
                gradient = torch.arange(8.0).view(4, 2) - step
                for p in (*plain, placed[1]):
                    p.grad = gradient.clone()
                placed[0].grad = distribute_tensor(gradient, mesh, [placement])
                opt.step(), reference.step()
            torch.testing.assert_close(placed[0].full_tensor(), plain[0])
            torch.testing.assert_close(placed[1], plain[1])
    finally:
        dist.destroy_process_group()
