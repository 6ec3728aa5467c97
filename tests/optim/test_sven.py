"""Sven against closed forms and against steps made of dense Jacobians."""
import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from gradops import linalg
from gradops.optim import Sven, capture, per_sample_gram, uses


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squares(y):
    return (y - 1).square().flatten(1).sum(1)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def dense(model, x, loss=squares):
    """Losses and their Jacobian, one backward pass per sample."""
    losses, params = loss(model(x)), list(model.parameters())
    rows = [torch.autograd.grad(value, params, retain_graph=True, allow_unused=True) for value in losses]
    return losses.detach(), torch.stack([
        flat(torch.zeros_like(p) if g is None else g for p, g in zip(params, row, strict=True)) for row in rows
    ])


def take(opt, model, x, loss=squares):
    with opt.capture(model):
        losses = loss(model(x))
    opt.step(losses)


class Sequence(nn.Module):
    """Tokens along the first dimension but one, on the way to one output per sample."""

    def __init__(self, body, batch_first=True):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8, padding_idx=3), body, nn.Linear(8, 2)
        self.batch_first = batch_first

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.body(x if self.batch_first else x.transpose(0, 1))
        y = y[0] if isinstance(y, tuple) else y
        return self.head(y).mean(1 if self.batch_first else 0)


class Tied(nn.Module):
    """The embedding is the head, and one layer is called twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.twice = nn.Embedding(11, 8), nn.RMSNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.twice(torch.relu(self.twice(self.embed(tokens)))))).mean(1)


class Own(nn.Module):
    """A parameter of its own; the layers below go with it."""

    def __init__(self):
        super().__init__()
        self.shift, self.layer = nn.Parameter(randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x + self.shift)


class Images(nn.Module):
    """Several images per sample, folded into the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3).eval(), nn.Linear(3, 2)

    def forward(self, x):
        y = self.norm(self.conv(x.flatten(0, 1))).relu_().mean((2, 3))
        return self.head(y).unflatten(0, x.shape[:2]).sum(1)


def integers(*shape):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))


torch.manual_seed(0)
MODELS = {
    "mlp": (nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3)), randn(6, 7)),
    "tokens": (nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.LayerNorm((5, 3)), nn.Linear(3, 2)), randn(6, 5, 4)),
    "conv": (nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.GroupNorm(2, 8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=4, padding="same", padding_mode="circular"), nn.Flatten(), nn.Linear(128, 3),
    ), randn(6, 4, 8, 8)),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.Tanh(), nn.InstanceNorm1d(5, affine=True), nn.Flatten(),
                             nn.Linear(50, 2)), randn(6, 3, 10)),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten(), nn.Linear(24, 2)), randn(6, 2, 3, 3, 3)),
    "lstm": (Sequence(nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True)), integers(6, 3)),
    "gru": (Sequence(nn.GRU(8, 8), batch_first=False), integers(6, 3)),
    "attention": (Sequence(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)), integers(6, 4)),
    "attention, tokens first": (Sequence(nn.TransformerEncoderLayer(8, 2, 16, 0.0), batch_first=False), integers(6, 6)),
    "tied": (Tied(), integers(6, 5)),
    "own": (Own(), randn(6, 5, 4)),
    "images": (Images(), randn(6, 3, 2, 4, 4)),
    "weight norm": (nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)), randn(6, 4)),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    model, x = MODELS[request.param]
    return copy.deepcopy(model).double(), x


def test_gram_is_that_of_the_dense_jacobian(case, monkeypatch):
    model, x = case
    _, J = dense(model, x)
    with capture(model):
        losses = squares(model(x))
    torch.testing.assert_close(per_sample_gram(losses, model), J @ J.mT)
    losses.sum().backward()  # the graph is still there
    monkeypatch.setattr(uses, "MAX_BYTES", 2000)  # one or two samples' gradients at a time
    with capture(model):
        losses = squares(model(x))
    torch.testing.assert_close(per_sample_gram(losses, model), J @ J.mT)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"kappa": 1.0, "microbatch": 2}],
                         ids=["plain", "spring", "microbatch"])
def test_two_steps_are_those_of_the_dense_jacobian(case, settings):
    model, x = case
    params = list(model.parameters())
    opt = Sven([{"params": params[::2]}, {"params": params[1::2], "lr": 0.05}], lr=0.1, rtol=1e-6, **settings)
    kappa, mu = settings.get("kappa", 2.0), settings.get("momentum", 0.0)
    theta, phi = flat(params), torch.zeros_like(flat(params))
    lr = flat(torch.full_like(p, 0.05 if i % 2 else 0.1) for i, p in enumerate(params))
    for _ in range(2):
        losses, J = dense(model, x)
        per_row = settings.get("microbatch", 1)
        losses, J = losses.view(-1, per_row).mean(1), J.view(len(losses) // per_row, per_row, -1).mean(1)
        rows, M = losses ** (kappa / 2), kappa / 2 * losses[:, None] ** (kappa / 2 - 1) * J
        phi = mu * phi + torch.linalg.pinv(M, rtol=1e-6) @ (rows - mu * M @ phi)
        theta = (1 - lr * settings.get("weight_decay", 0.0)) * theta - lr * phi
        take(opt, model, x)
        torch.testing.assert_close(flat(params), theta, rtol=1e-9, atol=1e-11)
    sigma = torch.linalg.svdvals(M)
    torch.testing.assert_close(opt.info.sigma, sigma, rtol=1e-6, atol=1e-6 * float(sigma[0]))
    assert int(opt.info.rank) == int((sigma > 1e-6 * sigma[0]).sum())


# Closed forms.


def linear(features, seed=1):
    model = nn.Linear(features, 1, bias=False).double()
    model.weight.data = randn(1, features, seed=seed)
    return model


def test_a_linear_model_lands_on_the_nearest_solution():
    model, x, y = linear(9), randn(5, 9), randn(5, seed=2)
    start = model.weight.detach().clone()
    take(Sven(model.parameters(), lr=1.0, kappa=1.0, rtol=1e-9), model, x, lambda z: (z[:, 0] - y).square())
    want = start + (torch.linalg.pinv(x) @ (y - x @ start[0]))
    torch.testing.assert_close(model.weight.detach(), want)


def test_from_zero_it_is_the_solution_of_least_norm_in_float32():
    model, x, y = nn.Linear(9, 1, bias=False), randn(5, 9).float(), randn(5, seed=2).float()
    nn.init.zeros_(model.weight)
    take(Sven(model.parameters(), lr=1.0, kappa=1.0), model, x, lambda z: (z[:, 0] - y).square())
    torch.testing.assert_close(model.weight.detach()[0], torch.linalg.pinv(x) @ y, rtol=1e-5, atol=1e-5)


def test_one_sample_is_kaczmarz():
    model, x, y = linear(4), randn(1, 4), 0.7
    start = model.weight.detach()[0].clone()
    take(Sven(model.parameters(), lr=1.0, kappa=1.0), model, x, lambda z: (z[:, 0] - y).square())
    want = start + (y - x[0] @ start) / x[0].square().sum() * x[0]
    torch.testing.assert_close(model.weight.detach()[0], want)


def test_fewer_parameters_than_samples_is_least_squares():
    model, x, y = linear(3), randn(8, 3), randn(8, seed=2)
    opt = Sven(model.parameters(), lr=1.0, rtol=1e-6)
    take(opt, model, x, lambda z: z[:, 0] - y)  # signed residuals
    torch.testing.assert_close(model.weight.detach()[0], torch.linalg.lstsq(x, y[:, None]).solution[:, 0])
    assert int(opt.info.rank) == 3


def test_push_through():
    """M^T (M M^T + mu)^-1 = (M^T M + mu)^-1 M^T: the tikhonov filter is Levenberg-Marquardt."""
    model, x, y, mu = linear(3), randn(8, 3), randn(8, seed=2), 0.3
    start = model.weight.detach()[0].clone()
    opt = Sven(model.parameters(), lr=1.0, filter="tikhonov", damping=mu)
    take(opt, model, x, lambda z: z[:, 0] - y)
    want = start - torch.linalg.solve(x.mT @ x + mu * torch.eye(3).double(), x.mT @ (x @ start - y))
    torch.testing.assert_close(model.weight.detach()[0], want)


def test_kappa_two_is_half_a_gauss_newton_step():
    x, y = randn(4, 6), randn(4, seed=2)
    moves = []
    for kappa in (1.0, 2.0):
        model = linear(6)
        start = model.weight.detach().clone()
        take(Sven(model.parameters(), lr=1.0, kappa=kappa, rtol=1e-9), model, x, lambda z: (z[:, 0] - y).square())
        moves.append(model.weight.detach() - start)
    torch.testing.assert_close(moves[1], moves[0] / 2)


def test_k_and_power():
    model, x = linear(6), randn(4, 6)
    start = model.weight.detach()[0].clone()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    opt = Sven(model.parameters(), lr=1.0, k=2, power=0.5)
    take(opt, model, x, lambda z: z[:, 0])
    want = start - vh[:2].mT @ (s[:2] ** -0.5 * (u[:, :2].mT @ (x @ start)))
    torch.testing.assert_close(model.weight.detach()[0], want)
    assert int(opt.info.rank) == 2


def test_a_loss_of_zero_gives_a_row_of_zeros():
    model, x = linear(3), randn(2, 3)
    target = torch.stack([model(x[:1]).detach()[0, 0], torch.tensor(1.0)])
    before = model.weight.detach().clone()
    take(Sven(model.parameters(), lr=1.0, kappa=1.0), model, x, lambda z: (z[:, 0] - target).square())
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)
    torch.testing.assert_close(model(x)[1, 0].detach(), target[1])


# What models may and may not do.


def step(model, x, loss=squares, **settings):
    take(Sven(model.parameters(), lr=0.1, **settings), model, x, loss)


class Mixing(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y - y.mean(0))


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) @ self.layer.weight


@pytest.mark.parametrize("model, message", [
    (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), r"1 \(BatchNorm1d\) normalises by the statistics of the batch"),
    (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False).eval()), r"1 \(BatchNorm1d\)"),
    (Mixing(nn.Linear(4, 3), nn.Linear(3, 2)), "depends on the output of 0 for other samples"),
    (Outside(), "layer.weight is used outside of the forward pass of its module"),
], ids=["batch norm", "batch norm, eval", "mixing", "outside"])
def test_what_has_no_per_sample_gradients_is_refused_by_name(model, message):
    before = flat(model.parameters())
    with pytest.raises(ValueError, match=message):
        step(model, torch.randn(6, 4))
    assert torch.equal(flat(model.parameters()), before) and not any(m._forward_hooks for m in model.modules())


def test_dropout_is_right_between_layers_and_refused_inside_of_a_module_that_is_run_again():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()
    x = randn(6, 4)
    opt = Sven(model.parameters(), lr=1.0, rtol=1e-6)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    losses, J = dense(twin, x)
    want = flat(twin.parameters()) - torch.linalg.pinv(J, rtol=1e-6) @ losses
    for _ in range(2):  # the first step may look twice
        start = copy.deepcopy(model.state_dict())
        torch.manual_seed(1)
        take(opt, model, x)
        torch.testing.assert_close(flat(model.parameters()), want)
        model.load_state_dict(start)
    with pytest.raises(ValueError, match=r"1 \(LSTM\) gave other outputs .*dropout"):
        lstm = nn.LSTM(4, 3, 2, dropout=0.5, batch_first=True)
        step(nn.Sequential(nn.Linear(4, 4), lstm), torch.randn(6, 5, 4), lambda y: squares(y[0]))


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq"])
def test_embeddings_with_other_gradients_are_refused(option):
    with pytest.raises(ValueError, match=f"0 \\(Embedding\\) has {option}"):
        step(nn.Sequential(nn.Embedding(5, 4, **{option: True})), torch.tensor([[1, 2], [3, 4]]))


def test_inputs_modified_in_place_are_refused():
    layer = nn.Linear(4, 3)
    opt, x = Sven(layer.parameters(), lr=0.1), torch.randn(6, 4)
    with opt.capture(layer):
        losses = squares(layer(x))
    x += 1
    with pytest.raises(RuntimeError, match="the model: its input was modified in place"):
        opt.step(losses)


def test_calls_without_gradients_are_refused():
    layer = nn.Linear(4, 3)
    with pytest.raises(RuntimeError, match="called without gradients"), capture(layer), torch.no_grad():
        layer(torch.randn(2, 4))


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight"])
def test_frozen_parameters_stay(frozen):
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 2)).double()
    model.get_parameter(frozen).requires_grad_(False)
    x, free = randn(5, 2, 4), [p for p in model.parameters() if p.requires_grad]
    before = model.get_parameter(frozen).clone()
    losses = squares(model(x))
    M = torch.stack([flat(torch.autograd.grad(value, free, retain_graph=True)) for value in losses])
    want = flat(free) - 0.1 * torch.linalg.pinv(M, rtol=1e-6) @ losses.detach()
    step(model, x, rtol=1e-6)
    torch.testing.assert_close(flat(free), want)
    assert torch.equal(model.get_parameter(frozen), before)


def test_only_the_parameters_of_the_optimizer_count():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    before = flat(model[0].parameters())
    opt = Sven(model[2].parameters(), lr=0.1, k=1)
    take(opt, model, randn(6, 4))
    assert torch.equal(flat(model[0].parameters()), before) and int(opt.info.rank) == 1
    assert all(p.grad is None for p in model.parameters())


def test_a_step_that_is_not_finite_changes_nothing():
    model = nn.Linear(4, 3)
    before = flat(model.parameters())
    opt = Sven(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    x = torch.randn(6, 4)
    x[2] = torch.nan
    take(opt, model, x)
    assert torch.equal(flat(model.parameters()), before) and int(opt.info.rank) == -1
    take(opt, model, torch.randn(6, 4))
    assert flat(model.parameters()).isfinite().all() and int(opt.info.rank) == 6


# What torch.optim's users rely on.


def test_checkpoint_scheduler_and_copy():
    x = torch.randn(6, 4)
    model = nn.Linear(4, 3).to(torch.bfloat16)
    opt = Sven(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    take(opt, model, x.bfloat16())
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.05
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = Sven(twin.parameters(), lr=1.0)
    other.load_state_dict(torch.load(file))
    assert other.state[twin.weight]["momentum_buffer"].dtype == torch.float32
    copy.deepcopy(opt)
    take(opt, model, x.bfloat16())
    take(other, twin, x.bfloat16())
    assert torch.equal(model.weight, twin.weight)


def test_tensor_lr_and_decay():
    x, models = torch.randn(6, 4), [nn.Linear(4, 3)]
    models.append(copy.deepcopy(models[0]))
    step(models[0], x, weight_decay=0.1)
    take(Sven(models[1].parameters(), torch.tensor([0.1]), weight_decay=torch.tensor(0.1)), models[1], x)
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_bad_settings():
    p = [nn.Parameter(torch.ones(2))]
    for settings, message in [
        ({"kappa": 0.0}, "kappa must be > 0"), ({"momentum": 1.0}, "momentum must be in"), ({"lr": -1}, "lr must be"),
        ({"microbatch": 0}, "microbatch must be"), ({"filter": "soft"}, "filter must be one of"),
        ({"rtol": 2.0}, "rtol must be in"), ({"k": -1}, "k must be None or"), ({"k": True}, "k must be None or"),
        ({"kappa": float("inf")}, "kappa must be > 0 and finite"), ({"microbatch": True}, "microbatch must be"),
        ({"power": float("nan")}, "power must be finite"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Sven(p, **settings)
    for name in ("lr", "rtol", "kappa", "damping", "power", "momentum", "weight_decay"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
            Sven(p, **{name: "1"})
    with pytest.raises(ValueError, match="k must be the same in every group, got None and 3"):
        Sven([{"params": p}, {"params": [nn.Parameter(torch.ones(2))], "k": 3}])


def test_bad_losses():
    model = nn.Linear(4, 3)
    opt, x = Sven(model.parameters()), torch.randn(6, 4)
    with pytest.raises(RuntimeError, match=r"opt\.capture"):
        opt.step(squares(model(x)))
    with pytest.raises(RuntimeError, match="the model was not captured"):
        per_sample_gram(squares(model(x)), model)
    for losses, error, message in [
        (lambda y: y.sum(), ValueError, r"losses must have shape \(B,\)"),
        (lambda y: 1.0, TypeError, "losses must be a torch.Tensor, got float"),
        (lambda y: squares(y).detach(), ValueError, "losses must depend on the parameters"),
        (lambda y: squares(y)[:5], ValueError, "its output has no dimension of 5 samples"),
    ]:
        with pytest.raises(error, match=message):
            take(opt, model, x, losses)
    with pytest.raises(ValueError, match="microbatch must divide the number of losses, 6, got 4"):
        step(model, x, microbatch=4)


def test_memory_beyond_the_forward_pass_is_less_than_twice_the_activations():
    from torch.profiler import ProfilerActivity, profile

    model = nn.Sequential(nn.Linear(512, 100), nn.GELU(), nn.Linear(100, 100), nn.GELU(), nn.Linear(100, 10))
    opt, x = Sven(model.parameters(), lr=0.1), torch.randn(128, 512)

    def peak(f):
        f()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            f()
        now = most = 0
        for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    forward = peak(lambda: squares(model(x)))
    activations = 4 * 128 * (512 + 4 * 100 + 10)
    assert peak(lambda: take(opt, model, x)) - forward < 2 * activations


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_autocast(name):
    model, x = MODELS[name]
    model, opts = copy.deepcopy(model).float(), []
    x = x.float() if x.is_floating_point() else x
    moves = []
    for enabled in (False, True):
        twin = copy.deepcopy(model)
        opts.append(Sven(twin.parameters(), lr=0.1, rtol=0.1))
        with opts[-1].capture(twin), torch.autocast("cpu", torch.bfloat16, enabled):
            losses = squares(twin(x).float())
        opts[-1].step(losses)
        moves.append(flat(twin.parameters()) - flat(model.parameters()))
    cosine = torch.cosine_similarity(*moves, 0)
    assert cosine > 0.98


def test_gram_is_the_sum_over_layers():
    """The Gram of a network from gram_outer alone, as one would write it by hand."""
    first, second, x = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), randn(6, 4)
    a = first(x)
    h = a.tanh()
    z = second(h)
    ga, gz = torch.autograd.grad(squares(z).sum(), (a, z))
    by_hand = linalg.gram_outer(h.detach(), gz, out=linalg.gram_outer(x, ga))
    model = nn.Sequential(first, nn.Tanh(), second)
    with capture(model):
        losses = squares(model(x))
    torch.testing.assert_close(per_sample_gram(losses, model), by_hand)
