import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradops.quant import (
    QuantizeConfig,
    QuantizedLinear,
    gptaq_cross_update_,
    gptq_quantize,
    hessian_update_,
    quantize_model,
    rtn_quantize,
)

from . import toys

CONFIG = QuantizeConfig(group_size=16, bits=3)
BATCHES = [toys.ids(4, 12, seed=i) for i in range(3)]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def run(model, batches=BATCHES, config=CONFIG, **options):
    return quantize_model(model, batches, config, progress=False, **options)


def padded(seed=0):
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3], [9]])).long()
    return {"input_ids": toys.ids(4, 12, seed=seed), "attention_mask": mask}


def codes(model):
    return {name: m.qweight for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def inputs(model, names, batches):
    """What the named layers are called with, batch by batch."""
    found = {name: [] for name in names}
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda m, x, n=name: found[n].append(x[0]))
               for name in names]  # fmt: skip
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return found


def by_hand(model, order, batches, config, masks=None):
    """The plainest way: for every layer, the whole model runs from the beginning, as it is then quantised."""
    exact = copy.deepcopy(model)
    found = {}
    for name in order:
        layer = model.get_submodule(name)
        n = layer.weight.shape[1]
        H, D, seen, seen_d = torch.zeros(n, n), torch.zeros(n, n), 0, 0
        theirs = inputs(exact, [name], batches)[name]
        for i, x in enumerate(inputs(model, [name], batches)[name]):
            mask = None if masks is None else masks[i]
            seen = hessian_update_(H, x, seen, mask=mask)
            seen_d = gptaq_cross_update_(D, theirs[i], x, seen_d, mask=mask)
        q = gptq_quantize(layer.weight, H, bits=config.bits, group_size=config.group_size, desc_act=config.desc_act,
                          method=config.method, D=D if "gptaq" in config.method else None,
                          scale_dtype=torch.float16)  # fmt: skip
        layer.weight.data = q.weight.detach()
        found[name] = QuantizedLinear.from_quantized(q, bits=config.bits, group_size=config.group_size).qweight
    return found


LLAMA = [f"layers.{i}.{name}" for i in range(2) for name in (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
)]  # fmt: skip
BERT = [f"layer.{i}.{name}" for i in range(2) for name in (
    "attention.q", "attention.k", "attention.v", "attention.o", "up", "down"
)]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"method": "foem"}, {"method": "gptaq"},
                                     {"method": "foem+gptaq", "desc_act": True}], ids=str)  # fmt: skip
def test_codes_are_those_of_the_plainest_loop(options):
    config = replace(CONFIG, **options)
    model, twin = toys.make(toys.Llama), toys.make(toys.Llama)
    report = run(model, config=config)
    assert [row.name for row in report.modules] == LLAMA
    assert {row.method for row in report.modules} == {config.method} and {row.info for row in report.modules} == {0}
    assert_same(codes(model), by_hand(twin, LLAMA, BATCHES, config))


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_padding_does_not_count(method):
    batches = [padded(0), padded(1)]
    config = replace(CONFIG, method=method)
    model, twin = toys.make(toys.Bert), toys.make(toys.Bert)
    report = run(model, batches, config)
    assert {row.tokens for row in report.modules} == {2 * int(batches[0]["attention_mask"].sum())}
    masks = [batch["attention_mask"].bool() for batch in batches]
    assert_same(codes(model), by_hand(twin, BERT, batches, config, masks))


def test_what_is_left_alone_is_named():
    model = toys.make(toys.Llama)
    report = run(model, config=replace(CONFIG, skip=("*.o",)))
    assert report.left == {"layers.0.self_attn.o": "skip='*.o'", "layers.1.self_attn.o": "skip='*.o'",
                           "lm_head": "outside the blocks"}  # fmt: skip
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed.weight
    table = str(report)
    assert "left alone: lm_head: outside the blocks" in table and "layers.1.mlp.down_proj" in table


def test_shared_weights_are_left_alone():
    model = toys.make(toys.Llama)
    model.layers[1].self_attn.q.weight = model.layers[0].self_attn.k.weight
    report = run(model)
    assert report.left["layers.1.self_attn.q"] == "its weight is also layers.0.self_attn.k.weight"
    assert report.left["layers.0.self_attn.k"] == "its weight is also layers.1.self_attn.q.weight"


def test_layers_with_one_input_share_a_hessian(monkeypatch):
    from gradops.quant import _calibrate

    made = []
    monkeypatch.setattr(_calibrate, "hessian_factor",
                        lambda H, **o: made.append(tuple(H.shape)) or factor(H, **o))  # fmt: skip
    factor = __import__("gradops").quant.hessian_factor
    run(toys.make(toys.Llama, blocks=1))
    assert made == [(1, 32, 32), (1, 32, 32), (1, 32, 32), (1, 64, 64)]  # q k v, o, gate up, down


def test_experts_go_in_one_call_and_the_one_without_tokens_is_rounded():
    model = toys.make(toys.Llama, toys.Experts)
    before = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run(model)
    rows = {row.name: row for row in report.modules}
    unseen = [f"layers.{i}.mlp.experts.3.{name}_proj" for i in range(2) for name in ("gate", "up", "down")]
    assert [str(w.message) for w in caught] == [f"{name}: rounded to nearest: no calibration batch reaches it"
                                                for name in unseen]  # fmt: skip
    for name in unseen:
        q = rtn_quantize(before.get_submodule(name).weight, bits=3, group_size=16, scale_dtype=torch.float16)
        assert rows[name].method == "rtn" and torch.equal(model.get_submodule(name).dequantize(), q.weight)
    assert report.left["layers.0.mlp.gate"] == "skip='*.gate'"
    seen = [rows[f"layers.0.mlp.experts.{i}.gate_proj"].tokens for i in range(3)]
    assert sum(seen) == 2 * 144 and rows["layers.0.mlp.experts.1.up_proj"].method == "gptq"
    for i in range(3):  # each from its own tokens only
        name = f"layers.0.mlp.experts.{i}.gate_proj"
        H, count = torch.zeros(32, 32), 0
        twin = copy.deepcopy(before)
        for part in ("q", "k", "v", "o"):
            layer = getattr(twin.layers[0].self_attn, part)
            layer.weight.data = getattr(model.layers[0].self_attn, part).dequantize()
        for x in inputs(twin, [name], BATCHES)[name]:
            count = hessian_update_(H, x, count)
        q = gptq_quantize(before.get_submodule(name).weight, H, bits=3, group_size=16, scale_dtype=torch.float16)
        assert torch.equal(model.get_submodule(name).dequantize(), q.weight)


def test_gptaq_without_counterparts_is_gptq_and_says_so():
    model = toys.make(toys.Llama, toys.Experts, blocks=1)
    with pytest.warns(UserWarning, match=r"experts\.0\.gate_proj.*quantised by gptq"):
        report = run(model, config=replace(CONFIG, method="gptaq"))
    methods = {row.name: row.method for row in report.modules}
    assert methods["layers.0.self_attn.o"] == "gptaq" and methods["layers.0.mlp.experts.0.down_proj"] == "gptq"


def test_few_tokens_mean_rounding():
    model = toys.make(toys.Llama, toys.Experts, blocks=1)
    with pytest.warns(UserWarning, match=r"experts\.\d\.gate_proj: rounded to nearest: saw \d+ of 144 tokens"):
        report = run(model, config=replace(CONFIG, min_token_share=0.6))
    assert {row.method for row in report.modules if "experts" in row.name} == {"rtn", "gptq"}


def test_fewer_tokens_than_inputs_is_said_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(toys.make(toys.Llama), [toys.ids(1, 12)])
    assert [str(w.message).split(":")[0] for w in caught] == ["layers.0.self_attn.q saw 12 tokens and has 32 inputs"]


def test_a_model_without_lists_is_one_block():
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    twin = copy.deepcopy(model)
    batches = [torch.randn(64, 32) for _ in range(2)]
    report = run(model, batches)
    assert [row.name for row in report.modules] == ["0", "2"] and not report.left
    assert_same(codes(model), by_hand(twin, ["0", "2"], batches, CONFIG))


def test_a_list_of_bare_layers():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    model, batches = toys.make(Mlp), [torch.randn(64, 32), torch.randn(64, 32)]
    twin = copy.deepcopy(model)
    run(model, batches)
    assert_same(codes(model), by_hand(twin, ["layers.0", "layers.1", "layers.2"], batches, CONFIG))


class Skips(nn.Module):
    """The third block also gets what the first returned: no chain."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        first = self.layers[0](x).relu()
        return self.head(self.layers[2](first + self.layers[1](first)))


def test_blocks_that_are_no_chain_run_as_one():
    model, batches = toys.make(Skips), [torch.randn(64, 32), torch.randn(64, 32)]
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="3 blocks layers.0 to layers.2 are no chain"):
        report = run(model, batches)
    assert report.left == {"head": "outside the blocks"}
    assert_same(codes(model), by_hand(twin, ["layers.0", "layers.1", "layers.2"], batches, CONFIG))


def test_encoder_and_decoder():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.ModuleList(toys.Gated() for _ in range(2))  # declared first, run last
            self.encoder = nn.ModuleList(toys.Gated() for _ in range(2))

        def forward(self, x):
            memory, y = x, x
            for block in self.encoder:
                memory = memory + block(memory)
            for block in self.decoder:
                y = y + block(y + memory)
            return y

    # What a block returned is kept as it was: sums between blocks are the model's own, and memory reaches every block.
    class Residual(toys.Gated):
        def forward(self, x, memory=0.0):
            return x + super().forward(x + memory)

    class Chain(Model):
        def __init__(self):
            super().__init__()
            self.decoder, self.encoder = (nn.ModuleList(Residual() for _ in range(2)) for _ in range(2))

        def forward(self, x):
            memory = x
            for block in self.encoder:
                memory = block(memory)
            for block in self.decoder:
                x = block(x, memory)
            return x

    batches = [torch.randn(3, 20, 32) for _ in range(2)]
    order = [f"{part}.{i}.{name}_proj" for part in ("encoder", "decoder") for i in range(2)
             for name in ("gate", "up", "down")]  # fmt: skip
    for kind in (Chain, Model):
        model = toys.make(kind)
        twin = copy.deepcopy(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = run(model, batches, replace(CONFIG, method="gptaq"))
        assert ["are no chain" in str(w.message) for w in caught] == [True] * (kind is Model)
        assert {row.method for row in report.modules} == {"gptaq"}
        assert_same(codes(model), by_hand(twin, order, batches, replace(CONFIG, method="gptaq")))


def test_in_place_residuals_and_a_layer_that_is_called_twice():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            y = self.a(x)
            y += x
            x = self.b(y)
            y.mul_(2)
            return x + self.b(y)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, batches = toys.make(Model), [torch.randn(50, 32) for _ in range(2)]
    twin = copy.deepcopy(model)
    report = run(model, batches)
    assert [row.tokens for row in report.modules] == [100, 200, 100, 200]
    H, seen = torch.zeros(32, 32), 0
    twin.blocks[0].a.weight.data = model.blocks[0].a.dequantize()
    for x in batches:
        y = twin.blocks[0].a(x) + x
        for z in (y, 2 * y):
            seen = hessian_update_(H, z.detach(), seen)
    q = gptq_quantize(twin.blocks[0].b.weight.detach(), H, bits=3, group_size=16, scale_dtype=torch.float16)
    assert torch.equal(model.blocks[0].b.dequantize(), q.weight)


def test_the_transposed_layer_of_gpt2():
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    conv, batches = Conv1D(48, 32), [torch.randn(64, 32)]
    linear = nn.Linear(32, 48)
    linear.weight.data, linear.bias.data = conv.weight.T.contiguous(), conv.bias.data
    models = nn.Sequential(conv), nn.Sequential(linear)
    for model in models:
        run(model, batches)
    assert_same(codes(models[0]), codes(models[1]))
    assert torch.equal(models[0](batches[0]), models[1](batches[0]))


def test_rounding_needs_no_calibration():
    model, twin = toys.make(toys.Llama), toys.make(toys.Llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run(model, None, replace(CONFIG, method="rtn"))
    assert [row.name for row in report.modules] == LLAMA and math.isnan(report.modules[0].damp)
    for name in LLAMA:
        q = rtn_quantize(twin.get_submodule(name).weight, bits=3, group_size=16, scale_dtype=torch.float16)
        assert torch.equal(model.get_submodule(name).dequantize(), q.weight)


def test_compensation_beats_rounding():
    torch.manual_seed(0)
    model = toys.make(toys.Llama)
    held_out = toys.ids(8, 12, seed=9)
    with torch.no_grad():
        hidden = lambda m: m.layers[1](m.layers[0](m.embed(held_out)))
        exact, found = hidden(model), {}
        for method in ("rtn", "gptq", "gptaq"):
            copied = copy.deepcopy(model)
            run(copied, [toys.ids(16, 12, seed=i) for i in range(8)], replace(CONFIG, method=method))
            found[method] = float(F.mse_loss(hidden(copied), exact))
    assert max(found["gptq"], found["gptaq"]) < 0.8 * found["rtn"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = toys.make(toys.Llama).to(dtype)
    report = run(model)
    assert {row.info for row in report.modules} == {0}
    assert model(BATCHES[0]).dtype == dtype and model(BATCHES[0]).isfinite().all()


def test_nan_inputs_mean_rounding():
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    with pytest.warns(UserWarning, match="0: rounded to nearest: its calibration inputs are not finite"):
        report = run(model, [torch.randn(64, 32), torch.full((2, 32), torch.nan)])
    assert [(row.method, row.info) for row in report.modules] == [("rtn", 2), ("rtn", 2)]
    assert report.modules[0].note == "its calibration inputs are not finite"


def test_zero_inputs_mean_rounding():
    model = nn.Sequential(nn.Linear(32, 16))
    with pytest.warns(UserWarning, match="all zero"):
        report = run(model, [torch.zeros(64, 32)])
    assert report.modules[0].info == 3 and model(torch.ones(1, 32)).isfinite().all()


def test_a_layer_that_is_never_called():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.ModuleList([nn.Linear(32, 32)]), nn.ModuleList([nn.Linear(32, 32)])

        def forward(self, x):
            return self.used[0](x)

    model = Model()
    with pytest.warns(UserWarning, match="idle.0: rounded to nearest: no calibration batch reaches it"):
        report = run(model, [torch.randn(64, 32)])
    assert [(row.name, row.method) for row in report.modules] == [("used.0", "gptq"), ("idle.0", "rtn")]
    assert type(model.idle[0]) is QuantizedLinear


def test_fused_experts_are_named():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 32, 32))

        def forward(self, x):
            return (x @ self.weight).mean(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.experts = nn.Linear(32, 32), Fused()

        def forward(self, x):
            return self.experts(self.proj(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block()])

        def forward(self, x):
            return self.layers[0](x)

    with pytest.warns(UserWarning, match="layers.0.experts: weights with three dimensions"):
        report = run(Model(), [torch.randn(64, 32)])
    assert "layers.0.experts" in report.left


def test_attention_of_torch_keeps_its_output_projection():
    """Its function reads that weight without calling the layer."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 32)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model = Model()
    report = run(model, [torch.randn(4, 16, 32)])
    assert [row.name for row in report.modules] == ["out"] and "attention.out_proj" in report.left


class Interrupted(Exception):
    pass


@pytest.mark.filterwarnings("ignore:layers")
@pytest.mark.parametrize("mlp, options, after", [
    (toys.Gated, {"method": "gptaq"}, 1), (toys.Gated, {"method": "gptaq"}, 5), (toys.Gated, {"method": "gptaq"}, 9),
    (toys.Experts, {"min_token_share": 0.6}, 4), (toys.Experts, {"min_token_share": 0.6, "method": "foem"}, 7),
])  # fmt: skip
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, mlp, options, after):
    from gradops.quant import _resume

    config = replace(CONFIG, **options)
    whole = toys.make(toys.Llama, mlp)
    report = run(whole, config=config)
    put, count = _resume.Store.put, iter(range(100))

    def failing(self, layer, result):
        put(self, layer, result)
        if next(count) == after:
            raise Interrupted

    with monkeypatch.context() as m:
        m.setattr(_resume.Store, "put", failing)
        with pytest.raises(Interrupted):
            run(toys.make(toys.Llama, mlp), config=config, resume=tmp_path)
    again = toys.make(toys.Llama, mlp)
    second = run(again, config=config, resume=tmp_path)
    assert_same(codes(whole), codes(again))
    facts = lambda r: {row.name: str(replace(row, seconds=0.0)) for row in r.modules}
    assert facts(second) == facts(report)
    third = toys.make(toys.Llama, mlp)
    run(third, config=config, resume=tmp_path)  # all of it is there
    assert_same(codes(whole), codes(third))
    assert torch.equal(third(BATCHES[0]), whole(BATCHES[0]))


def test_results_of_another_run_are_refused(tmp_path):
    run(toys.make(toys.Llama), resume=tmp_path)
    with pytest.raises(ValueError, match="holds results of a run with other config"):
        run(toys.make(toys.Llama), config=replace(CONFIG, bits=4), resume=tmp_path)
    with pytest.raises(ValueError, match="other calibration"):
        run(toys.make(toys.Llama), BATCHES[:1], resume=tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        run(toys.make(toys.Llama, seed=1), resume=tmp_path)


def test_the_model_is_as_it_was_outside(recwarn):
    model = toys.make(toys.Llama).train()
    run(model)
    assert model.training and model.layers[0].mlp.up_proj.training
    for module in model.modules():
        assert "forward" not in module.__dict__ and not module._forward_pre_hooks and not module._forward_hooks
    assert not recwarn.list


def test_progress_bar(capsys):
    pytest.importorskip("rich")
    quantize_model(nn.Sequential(nn.Linear(32, 8)), [torch.randn(64, 32)], CONFIG, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "model, batches, config, error, says",
    [
        (nn.Sequential(nn.ReLU()), BATCHES, CONFIG, ValueError, "no Linear layer"),
        (nn.Sequential(nn.Linear(8, 8)), [], CONFIG, ValueError, "calibration must hold batches"),
        (nn.Sequential(nn.Linear(8, 8)), None, CONFIG, ValueError, "calibration must hold batches"),
        (nn.Sequential(nn.Linear(8, 8)), torch.ones(3, 8), CONFIG, TypeError, "calibration must be an iterable"),
        (nn.Sequential(nn.Linear(8, 8)), {"x": torch.ones(3, 8)}, CONFIG, TypeError, "calibration must be an iterable"),
        (nn.Sequential(nn.Linear(8, 8)), BATCHES, {"bits": 4}, TypeError, "config must be a QuantizeConfig"),
    ],
)  # fmt: skip
def test_wrong_arguments(model, batches, config, error, says):
    with pytest.raises(error, match=says):
        run(model, batches, config)


def test_weights_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[1, 2] = torch.inf
    with pytest.raises(ValueError, match="the weight of 0 must be finite"):
        run(model, [torch.randn(16, 8)])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"bits": 5}, "bits"), ({"method": "awq"}, "method"), ({"group_size": 0}, "group_size"),
        ({"damp_percent": 2.0}, "damp_percent"), ({"min_token_share": -1.0}, "min_token_share"),
        ({"desc_act": True, "act_group_aware": True}, "two orders"), ({"sym": False}, "gptq_v2"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"), ({"mse": -1.0}, "mse"),
    ],
)  # fmt: skip
def test_wrong_configurations(options, says):
    with pytest.raises(ValueError, match=says):
        QuantizeConfig(**options)
    with pytest.raises(TypeError, match="skip"):
        QuantizeConfig(skip="*.gate")
