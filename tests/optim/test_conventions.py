"""What torch.optim users rely on: groups, checkpoints, schedulers, loss scaling, capture, compile, errors."""

import copy
import io

import pytest
import torch

from gradops import linalg
from gradops.optim import AdamW, HybridPolarGradM, Muon, PolarGrad, RowNormM, SymmetryOptimizer

from .cases import ALL, MATRIX, give_grads, parameters, run


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the batches that reach the kernels."""
    seen = []

    def watch(function):
        def wrapped(x, *args, **kwargs):
            seen.append(tuple(x.shape))
            return function(x, *args, **kwargs)

        return wrapped

    for name in ("newton_schulz", "polar", "row_norm", "one_sided_polar"):
        monkeypatch.setattr(linalg, name, watch(getattr(linalg, name)))
    return seen


@pytest.mark.parametrize("name", MATRIX)
def test_one_kernel_call_per_shape_across_groups(name, calls):
    cls, settings = MATRIX[name]
    params = parameters(*[(8, 6)] * 4, *[(6, 8)] * 2)
    opt = cls([{"params": params[::2]}, {"params": params[1::2], "lr": 1e-3, "weight_decay": 0.2}], **settings)
    calls.clear()
    run(opt, params, steps=1)
    per_shape = 2 if cls is HybridPolarGradM else 1
    assert sorted(calls) == sorted([(4, 8, 6), (2, 6, 8)] * per_shape)


def test_unequal_settings_do_not_share_a_call(calls):
    params = parameters((8, 6), (8, 6), (8, 6))
    opt = Muon([{"params": params[:2]}, {"params": params[2:], "ns_steps": 3}])
    calls.clear()
    run(opt, params, steps=1)
    assert sorted(calls) == [(1, 8, 6), (2, 8, 6)]


def test_large_batches_are_cut(calls, monkeypatch):
    monkeypatch.setattr("gradops.optim.base.MAX_BATCH_ELEMENTS", 100)
    params, whole = parameters(*[(8, 6)] * 5), parameters(*[(8, 6)] * 5)
    opt = Muon(params)
    calls.clear()
    run(opt, params, steps=1)
    assert calls == [(2, 8, 6), (2, 8, 6), (1, 8, 6)]
    monkeypatch.undo()
    run(Muon(whole), whole, steps=1)
    assert all(torch.equal(p, q) for p, q in zip(params, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_checkpoint_resumes_exactly(name, dtype):
    cls, settings = ALL[name]
    params = parameters((8, 6), (8, 6), (6, 8), dtype=dtype)
    opt = cls(params, **settings)
    run(opt, params)
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "params": [p.detach().clone() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed = [torch.nn.Parameter(p) for p in saved["params"]]
    other = cls(resumed, lr=1.0)
    other.load_state_dict(state_dict=saved["opt"])
    for p, q in zip(params, resumed, strict=True):
        for key, value in opt.state[p].items():
            assert value.dtype == torch.float32 and other.state[q][key].dtype == torch.float32
    expected, got = run(opt, params, seed=50), run(other, resumed, seed=50)
    assert all(torch.equal(p, q) for p, q in zip(expected, got, strict=True))


def test_loading_copies_and_hooks_run():
    params, twins = parameters((4, 4)), parameters((4, 4))
    a, b = Muon(params), Muon(twins)
    run(a, params)
    order = []
    b.register_load_state_dict_pre_hook(lambda opt, sd: order.append("pre"))
    b.register_load_state_dict_post_hook(lambda opt: order.append(opt.state[twins[0]]["momentum_buffer"].clone()))
    b.load_state_dict(a.state_dict())
    momentum = a.state[params[0]]["momentum_buffer"]
    assert order[0] == "pre" and torch.equal(order[1], momentum)
    assert b.state[twins[0]]["momentum_buffer"].data_ptr() != momentum.data_ptr()
    assert not b._optimizer_load_state_dict_pre_hooks or len(b._optimizer_load_state_dict_pre_hooks) == 1


def test_loads_a_checkpoint_of_torch_muon():
    theirs, ours = parameters((8, 6)), parameters((8, 6))
    old = torch.optim.Muon(theirs, lr=0.02)
    run(old, theirs)
    new = Muon(ours)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.state[ours[0]]["momentum_buffer"], old.state[theirs[0]]["momentum_buffer"])
    assert new.param_groups[0]["lr"] == 0.02
    run(new, ours, steps=1)


@pytest.mark.parametrize("name", ALL)
def test_copy_and_pickle(name):
    cls, settings = ALL[name]
    params = parameters((8, 6))
    opt = cls(params, **settings)
    run(opt, params)
    twin = copy.deepcopy(opt)
    run(twin, twin.param_groups[0]["params"], seed=5)
    run(opt, params, seed=5)
    assert torch.equal(twin.param_groups[0]["params"][0], params[0])


@pytest.mark.parametrize("name", ALL)
def test_tensor_lr_and_decay(name):
    cls, settings = ALL[name]
    a, b = parameters((8, 6), (8, 6)), parameters((8, 6), (8, 6))
    settings = {"weight_decay": 0.0, **settings}
    tensors = {"lr": torch.tensor(settings["lr"]), "weight_decay": torch.tensor([settings["weight_decay"]])}
    plain = run(cls(a, **settings), a)
    for p, q in zip(plain, run(cls(b, **{**settings, **tensors}), b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_no_host_sync(name):
    """On fake tensors every read of a value raises: tensor lr, loss scaling and the step itself make none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cls, settings = ALL[name]
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.randn(8, 6)) for _ in range(2)]
        opt = cls(params, **settings)
        opt.param_groups[0]["lr"] = torch.tensor(0.1)
        opt.param_groups[0]["weight_decay"] = torch.tensor(0.1)
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        for p in params:
            p.grad = torch.randn(8, 6)
        opt.step()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("device_type", ["cpu"])
def test_grad_scaler(name, device_type):
    cls, settings = ALL[name]
    scaled, plain = parameters((8, 6), (8, 6)), parameters((8, 6), (8, 6))
    a, b = cls(scaled, **settings), cls(plain, **settings)
    scaler = torch.amp.GradScaler(device_type, init_scale=1024.0)
    for k in range(4):
        give_grads(plain, k)
        skip = k == 2
        for p, q in zip(scaled, plain, strict=True):
            p.grad = q.grad * scaler.scale(torch.ones(()))
        before = [p.detach().clone() for p in scaled]
        state = copy.deepcopy(a.state_dict()["state"])
        if skip:
            scaled[0].grad[0, 0] = float("inf")
        if k == 1:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if skip:
            assert all(torch.equal(p, q) for p, q in zip(scaled, before, strict=True))
            for i, old in state.items():
                assert all(torch.equal(old[key], value) for key, value in a.state_dict()["state"][i].items())
            continue
        b.step()
        for p, q in zip(scaled, plain, strict=True):
            assert torch.equal(p, q)
    assert not hasattr(a, "found_inf")


@pytest.mark.parametrize("name", ALL)
def test_closure_none_grads_and_empty(name):
    cls, settings = ALL[name]
    used, unused, empty = parameters((8, 6), (8, 6), (0, 6))
    empty.grad = torch.zeros_like(empty)
    opt = cls([used, unused, empty], **settings)
    kept = unused.detach().clone()

    def closure():
        opt.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure) > opt.step(closure) > 0
    assert torch.equal(unused, kept)
    assert unused not in opt.state


def test_schedulers():
    params = parameters((8, 6))
    opt = Muon(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5)
    seen = []
    for _ in range(4):
        run(opt, params, steps=1)
        scheduler.step()
        seen.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
    assert len(set(seen)) == 4


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_parameters_have_float32_state_and_one_rounding(name):
    cls, settings = ALL[name]
    low = parameters((8, 6), (8, 6), dtype=torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in low]
    extra = {"precision": "medium"} if cls is Muon else {}
    a, b = cls(low, **settings), cls(wide, **settings, **extra)
    give_grads(low)
    for p, q in zip(low, wide, strict=True):
        q.grad = p.grad.float()
    a.step(), b.step()
    for p, q in zip(low, wide, strict=True):
        assert all(s.dtype == torch.float32 for s in a.state[p].values())
        assert torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("name", ALL)
def test_non_contiguous_parameters(name):
    cls, settings = ALL[name]
    strided, plain = (parameters((6, 8))[0] for _ in range(2))
    strided = torch.nn.Parameter(strided.detach().mT.contiguous().mT)
    expected = run(cls([plain], **settings), [plain])[0]
    opt = cls([strided], **settings)
    torch.testing.assert_close(run(opt, [strided])[0], expected, rtol=1e-5, atol=1e-6)
    assert all(s.stride() == strided.stride() for s in opt.state[strided].values() if s.dim())


@pytest.mark.parametrize("cls, settings", [(Muon, {}), (PolarGrad, {"method": "newton_schulz"}), (RowNormM, {}),
                                           (AdamW, {})])  # fmt: skip
def test_compiled_step(cls, settings):
    compiled, eager = parameters((8, 6), (8, 6)), parameters((8, 6), (8, 6))
    a, b = cls(compiled, lr=torch.tensor(0.02), **settings), cls(eager, lr=torch.tensor(0.02), **settings)
    step = torch.compile(a.step, backend="aot_eager")
    for k in range(3):
        give_grads(compiled, k), give_grads(eager, k)
        step(), b.step()
    for p, q in zip(compiled, eager, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_compiled_model_trains():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    compiled = torch.compile(model, backend="aot_eager")
    opt = SymmetryOptimizer(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "update": "muon", "lr": 0.05},
            {"params": [p for p in model.parameters() if p.ndim == 1], "update": "adamw", "lr": 0.01},
        ]
    )
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    losses = []
    for _ in range(30):
        loss = (compiled(x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "cls, shape, settings, error, match",
    [
        (Muon, (4,), {}, ValueError, r"parameter 0 .* shape \(4,\)"),
        (Muon, (4, 4), {"lr": -1.0}, ValueError, "lr must be >= 0, got -1.0"),
        (Muon, (4, 4), {"lr": torch.ones(2)}, ValueError, r"lr must have one element.*\(2,\)"),
        (Muon, (4, 4), {"weight_decay": float("nan")}, ValueError, "weight_decay must be >= 0"),
        (Muon, (4, 4), {"momentum": 1.0}, ValueError, "momentum must be in"),
        (Muon, (4, 4), {"ns_steps": 0}, ValueError, "ns_steps must be an int >= 1, got 0"),
        (Muon, (4, 4), {"ns_coefficients": "best"}, ValueError, "coefficients"),
        (Muon, (4, 4), {"adjust_lr_fn": "x"}, ValueError, "adjust_lr_fn must be"),
        (Muon, (4, 4), {"precision": "low"}, ValueError, "precision must be"),
        (Muon, (4, 4), {"state_dtype": torch.int32}, TypeError, "state_dtype must be"),
        (Muon, (4, 4), {"layout": "conv"}, ValueError, "layout must be one of"),
        (Muon, (4, 4), {"layout": "heads"}, ValueError, "heads must be a positive int"),
        (Muon, (4, 4), {"layout": "heads", "heads": 3}, ValueError, "multiple of 3"),
        (PolarGrad, (4, 4), {"method": "magic"}, ValueError, "method must be"),
        (HybridPolarGradM, (4, 4), {"order": "x"}, ValueError, "order must be"),
        (HybridPolarGradM, (4, 4), {"side": "top"}, ValueError, "side must be"),
        (HybridPolarGradM, (4, 4), {"eps": 0.0}, ValueError, "eps must be > 0"),
        (RowNormM, (4, 4), {"eps": -1.0}, ValueError, "eps must be >= 0"),
        (AdamW, (4, 4), {"betas": (1.0, 0.9)}, ValueError, "betas must be"),
        (SymmetryOptimizer, (4, 4), {"update": "magic"}, ValueError, "update must be one of"),
    ],
)
def test_bad_settings(cls, shape, settings, error, match):
    with pytest.raises(error, match=match):
        cls(parameters(shape), **settings)


def test_bad_parameters_and_gradients():
    with pytest.raises(TypeError, match="complex64"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"'bias' has shape \(4,\)"):
        Muon(torch.nn.Linear(4, 4).named_parameters())
    with pytest.raises(ValueError, match="no setting 'ns_step'"):
        SymmetryOptimizer([{"params": parameters((4, 4)), "ns_step": 3}])
    opt = Muon(parameters((4, 4)))
    with pytest.raises(ValueError, match="momentum"):
        opt.add_param_group({"params": parameters((4, 4)), "momentum": 2.0})
    assert len(opt.param_groups) == 1
    table = torch.nn.Embedding(8, 4, sparse=True)
    table(torch.arange(3)).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        RowNormM(table.parameters()).step()


def test_dtensor():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        (plain,) = parameters((8, 6))
        p = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Replicate()]))
        opt, reference = Muon([p], lr=0.1), Muon([plain], lr=0.1)
        give_grads([plain])
        p.grad = distribute_tensor(plain.grad.clone(), mesh, [Replicate()])
        opt.step(), reference.step()
        assert torch.equal(p.full_tensor(), plain)
        sharded = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
        with pytest.raises(NotImplementedError, match="whole matrices"):
            Muon([sharded])
        AdamW([sharded])
    finally:
        dist.destroy_process_group()
