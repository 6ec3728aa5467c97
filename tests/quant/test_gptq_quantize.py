"""gptq_quantize against the column loop in float64, given the same factor and scales, and end to end."""
import pytest
import torch

from gradops.quant import gptq_quantize, hessian_update_, reference, rtn_quantize
from gradops.quant.reference import columns


def problem(*lead, rows=40, n=110, seed=0, tokens=220):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(*lead, tokens, n, generator=g, dtype=torch.float64)
    X = X * torch.exp(0.7 * torch.randn(n, generator=g, dtype=torch.float64))
    X = X + torch.randn(*lead, tokens, 8, generator=g, dtype=torch.float64) @ torch.randn(
        *lead, 8, n, generator=g, dtype=torch.float64)
    W = 0.02 * torch.randn(*lead, rows, n, generator=g)
    D = 2 / tokens * (0.1 * torch.randn(X.shape, generator=g, dtype=torch.float64)).mT @ X
    return W, 2 / tokens * X.mT @ X, D


def upper(H, damp=0.01):
    n = H.shape[-1]
    eye = torch.eye(n, dtype=H.dtype)
    damped = H + damp * H.diagonal(0, -2, -1).mean(-1)[..., None, None] * eye
    lower = torch.linalg.cholesky(damped.flip(-2, -1))
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).flip(-2, -1)


def proxy(W, H, q):
    gap = q.weight.double() - W
    return ((gap @ H) * gap).sum()


def assert_equal_up_to_ties(ours, exact, ratios, order, bits):
    """Codes are equal but in rows whose first difference is a rounding tie in float64, and at most 0.3 % differ."""
    tie = 1e-5 * max(1, 2 ** (bits - 4))  # w / scale grows with the number of codes, and with it its error
    differ = (ours.codes != exact.codes)[:, order]
    assert differ.double().mean() <= 3e-3
    for row in differ.any(-1).nonzero()[:, 0].tolist():
        at = int(differ[row].int().argmax())
        ratio = float(ratios[at][row])
        assert abs(abs(ratio - round(ratio)) - 0.5) < tie, (row, at, ratio)


OPTIONS = [
    {}, {"sym": False}, {"bits": 2}, {"bits": 3, "sym": False}, {"bits": 8}, {"group_size": 48}, {"group_size": 90},
    {"group_size": -1}, {"block_size": 20, "group_size": 16}, {"desc_act": True}, {"act_group_aware": True},
    {"method": "foem"}, {"method": "foem", "pull_across_blocks": True, "desc_act": True}, {"method": "gptaq"},
    {"method": "gptaq", "compat": "authors"}, {"method": "foem+gptaq"}, {"method": "foem+gptaq", "compat": "authors"},
]  # fmt: skip
IDS = ["-".join(f"{k}={v}" for k, v in o.items()) or "plain" for o in OPTIONS]


def with_d(options, D):
    return options | {"D": D} if "gptaq" in options.get("method", "") else options


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_codes_equal_float64_given_factor_and_scales(options, monkeypatch):
    W, H, D = problem()
    options = {"group_size": 32, "block_size": 64} | with_d(options, D)
    g = W.shape[-1] if options["group_size"] == -1 else options["group_size"]
    order = columns.column_order(H.diagonal(), g, options.get("desc_act", False), options.get("act_group_aware", False))
    order = torch.arange(W.shape[-1]) if order is None else order
    # A little above the chosen ones, which make the lowest number of every symmetric group a tie.
    first = rtn_quantize(W, **{k: v for k, v in options.items() if k in ("bits", "group_size", "sym")})
    given = {"factor": upper(H[order][:, order]).float(), "scales": 1.01 * first.scales, "zeros": first.zeros}
    ratios = []

    def watched(w, scale, *args, _round=columns._round):
        ratios.append(w / scale)
        return _round(w, scale, *args)

    monkeypatch.setattr(columns, "_round", watched)
    exact = reference.gptq_quantize(W.double(), H, **options, **given)
    ours = gptq_quantize(W, H, **options, **given)
    assert_equal_up_to_ties(ours, exact, ratios, order, options.get("bits", 4))
    assert torch.equal(ours.g_idx, exact.g_idx)
    torch.testing.assert_close(ours.scales.double(), exact.scales, rtol=0, atol=0)
    same = (ours.codes == exact.codes).all(-1)
    torch.testing.assert_close(ours.weight[same].double(), exact.weight[same], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.loss[same].double(), exact.loss[same], rtol=1e-4, atol=0)  # float32 latents


@pytest.mark.parametrize("options", [
    {}, {"group_params": "block"}, {"group_size": 50, "group_params": "block"}, {"group_size": 90},
    {"group_size": 90, "group_params": "block"}, {"desc_act": True}, {"desc_act": True, "static_groups": True},
    {"act_group_aware": True, "group_size": 48}, {"act_group_aware": True, "static_groups": True},
    {"mse": 2.4, "group_size": 60}, {"mse": 2.0, "sym": False, "group_size": 60}, {"scale_dtype": torch.float16},
    {"scale_dtype": torch.bfloat16}, {"grid": "nvfp4", "group_size": 16}, {"grid": "mxfp4"}, {"method": "foem+gptaq"},
], ids=str)  # fmt: skip
def test_end_to_end(options):
    """Factor and scales are each side's own. A tie that falls the other way changes the rest of its row."""
    W, H, D = problem(rows=32)
    options = {"group_size": 32, "block_size": 64} | with_d(options, D)
    ours, exact = gptq_quantize(W, H.float(), **options), reference.gptq_quantize(W.double(), H, **options)
    assert (ours.codes != exact.codes).any(-1).double().mean() <= 0.1
    same = (ours.codes == exact.codes).all(-1)
    torch.testing.assert_close(ours.scales[same].double(), exact.scales[same], rtol=1e-4, atol=0)
    assert torch.equal(ours.zeros[same].double(), exact.zeros[same])
    assert torch.equal(ours.g_idx, exact.g_idx)
    assert abs(proxy(W, H, ours) / proxy(W, H, exact) - 1) < 5e-3
    assert int(ours.info) == 0


MANY_BLOCKS = [
    {}, {"method": "foem"}, {"method": "foem", "pull_across_blocks": True}, {"group_size": -1},
    {"group_size": -1, "group_params": "block"}, {"group_params": "block"}, {"group_size": 45, "group_params": "block"},
    {"group_size": 90}, {"group_size": 90, "method": "gptaq"}, {"group_size": 70, "method": "foem"},
    {"method": "gptaq"}, {"method": "gptaq", "compat": "authors"}, {"method": "foem+gptaq"},
    {"group_size": 45, "group_params": "block", "method": "foem+gptaq", "compat": "authors"},
    {"static_groups": True, "desc_act": True},
]  # fmt: skip


@pytest.mark.parametrize("options", MANY_BLOCKS, ids=str)
def test_scales_and_losses_over_many_blocks(options):
    """The walk along R = U^-1, and along U where groups go beyond their block: both say what the definition says."""
    W, H, D = problem(rows=24, n=230)
    options = {"group_size": 16, "block_size": 32} | with_d(options, D)
    ours, exact = gptq_quantize(W, H, **options), reference.gptq_quantize(W.double(), H, **options)
    same = (ours.codes == exact.codes).all(-1)
    assert same.double().mean() >= 0.9  # ties
    torch.testing.assert_close(ours.scales[same].double(), exact.scales[same], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.loss[same].double(), exact.loss[same], rtol=1e-3, atol=0)
    assert abs(proxy(W, H, ours) / proxy(W, H, exact) - 1) < 0.03  # one row of 24 that went the other way


@pytest.mark.parametrize("bits, options", [
    (2, {}), (3, {"sym": False}), (4, {}), (4, {"scale_dtype": torch.float16}), (4, {"mse": 2.4}),
    (5, {"group_size": -1}), (8, {"sym": False}),
], ids=str)  # fmt: skip
def test_rtn_equals_the_reference(bits, options):
    W = torch.randn(2, 9, 45, generator=torch.Generator().manual_seed(0))
    options = {"group_size": 16} | options
    ours, exact = rtn_quantize(W, bits=bits, **options), reference.rtn_quantize(W.double(), bits=bits, **options)
    ratio = W.double() / exact.scales[..., exact.g_idx[0].long()]
    differ = ours.codes != exact.codes  # at ties: the lowest number of a symmetric group is one
    assert ((ratio - ratio.round()).abs()[differ] > 0.5 - 1e-5).all()
    torch.testing.assert_close(ours.scales.double(), exact.scales, rtol=1e-6, atol=0)
    assert torch.equal(ours.zeros.double(), exact.zeros)


@pytest.mark.parametrize("grid, group", [("nvfp4", 16), ("mxfp4", 32)])
def test_fp4_grids(grid, group):
    W = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    W[0, :group] = 0
    ours, exact = rtn_quantize(W, grid=grid, group_size=group), reference.rtn_quantize(W, grid=grid, group_size=group)
    assert torch.equal(ours.codes, exact.codes)
    torch.testing.assert_close(ours.weight, exact.weight)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    code = ours.codes.long()
    want = torch.where(code >= 8, -1, 1) * values[code % 8] * ours.scales[:, ours.g_idx.long()]
    assert torch.equal(ours.weight, want)


def test_gptq_beats_rounding_and_order_helps():
    W, H, _ = problem(rows=64)
    loss = {name: proxy(W, H, q) for name, q in {
        "rtn": rtn_quantize(W, bits=3, group_size=32),
        "gptq": gptq_quantize(W, H, bits=3, group_size=32),
        "desc_act": gptq_quantize(W, H, bits=3, group_size=32, desc_act=True),
    }.items()}  # fmt: skip
    assert loss["desc_act"] < loss["gptq"] < 0.5 * loss["rtn"]


@pytest.mark.parametrize("options", [{}, {"desc_act": True, "sym": False}, {"act_group_aware": True}], ids=str)
def test_foem_with_beta_0_and_gptaq_with_alpha_0_are_gptq(options):
    W, H, D = problem()
    plain = gptq_quantize(W, H, group_size=32, **options)
    for other in ({"method": "foem", "beta": 0.0}, {"method": "gptaq", "alpha": 0.0, "D": D}):
        q = gptq_quantize(W, H, group_size=32, **options, **other)
        assert all(torch.equal(a, b) for a, b in zip(plain, q, strict=True))


@pytest.mark.parametrize("options", [{}, {"desc_act": True, "method": "foem"}, {"group_size": 90},
                                     {"method": "foem+gptaq", "act_group_aware": True}], ids=str)  # fmt: skip
def test_a_batch_equals_a_loop_code_for_code(options):
    W, H, D = problem(3, rows=37, n=170)
    options = {"group_size": 32} | options
    batch = gptq_quantize(W, H, **with_d(options, D))
    for i in range(3):
        alone = gptq_quantize(W[i], H[i], **with_d(options, D[i]))
        assert all(torch.equal(a[i], b) for a, b in zip(batch, alone, strict=True))
    rows = gptq_quantize(W[0, 30:], H[0], **with_d(options, D[0]))  # nor do rows depend on their neighbours
    assert torch.equal(rows.codes, batch.codes[0, 30:])


def test_results_do_not_depend_on_the_number_of_threads():
    W, H, D = problem(2, rows=90, n=170)
    factor = upper(H)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gptq_quantize(W, H, group_size=32, method="foem+gptaq", D=D, factor=factor))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype):
    W, H, _ = problem(2, rows=20, n=70)
    W = W.to(dtype)
    q = gptq_quantize(W, H, group_size=32)
    assert q.weight.dtype == dtype and q.codes.dtype == torch.uint8
    before = W.clone()
    strided = gptq_quantize(W.mT.contiguous().mT, H.mT, group_size=32)
    assert torch.equal(strided.codes, q.codes) and torch.equal(W, before)
    wide = torch.zeros(2, 20, 140, dtype=dtype)
    wide[..., ::2] = W
    assert torch.equal(rtn_quantize(wide[..., ::2], group_size=32).codes, rtn_quantize(W, group_size=32).codes)
    shared = gptq_quantize(W, H[0], group_size=32)
    assert torch.equal(shared.codes[0], q.codes[0])


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (2, 3, 0), (2, 1, 1), (1, 3, 130)])
def test_odd_shapes(shape):
    W = torch.randn(shape)
    q = gptq_quantize(W, torch.eye(shape[-1]), group_size=16)
    groups = -(-shape[-1] // min(16, max(1, shape[-1])))
    assert q.codes.shape == q.weight.shape == shape and q.scales.shape == (*shape[:2], groups)
    assert q.loss.shape == shape[:2] and q.info.shape == shape[:1] and q.g_idx.shape == (shape[0], shape[2])


def test_codes_scales_and_weight_agree():
    W, H, _ = problem(2, rows=20, n=100)
    for options in ({"desc_act": True}, {"act_group_aware": True, "sym": False}, {"static_groups": True}):
        q = gptq_quantize(W, H, group_size=32, **options)
        where = q.g_idx.long()[:, None].expand(q.codes.shape)
        want = q.scales.take_along_dim(where, -1) * (q.codes - q.zeros.take_along_dim(where, -1))
        assert torch.equal(q.weight, want)


def test_one_singular_expert_is_rounded_to_nearest():
    W, H, D = problem(4, rows=12, n=60)
    H[1] = -1.0  # indefinite
    H[1].diagonal().fill_(1.0)
    H[2] = 0
    H[3, 4, 5] = H[3, 5, 4] = torch.nan
    for method in ("gptq", "foem+gptaq"):
        options = with_d({"method": method, "group_size": 16}, D)
        q = gptq_quantize(W, H, **options)
        assert q.info.tolist() == [0, 1, 3, 2]
        plain = rtn_quantize(W, group_size=16)
        if method == "gptq":
            assert torch.equal(q.codes[1:], plain.codes[1:])
        alone = gptq_quantize(W[0], H[0], **with_d(options, D[0]))
        assert torch.equal(q.codes[0], alone.codes) and q.weight.isfinite().all()


def test_experts_from_tokens_to_codes():
    """One saw no token, one a NaN, one the same input as often as there are tokens, one never its inputs 3 and 4."""
    W, _, _ = problem(5, rows=6, n=40)
    X = torch.randn(5, 90, 40, generator=torch.Generator().manual_seed(2))
    X[1, 5, 7] = torch.nan
    X[2] = X[2, :1]
    X[3, :, 3:5] = 0
    mask = torch.ones(5, 90, dtype=torch.bool)
    mask[0] = False
    H = torch.zeros(5, 40, 40)
    hessian_update_(H, X, torch.zeros(5, dtype=torch.int64), mask=mask)
    q = gptq_quantize(W, H, group_size=16)
    assert q.info.tolist() == [3, 2, 0, -2, 0]  # damping makes what one token says definite
    assert q.weight.isfinite().all() and (q.weight[3, :, 3:5] == 0).all()
    assert gptq_quantize(W, H, group_size=16, damp_percent=0.0).info.tolist()[:2] == [3, 2]
    plain = rtn_quantize(W, group_size=16)
    assert torch.equal(q.codes[:2], plain.codes[:2])


def test_damping_is_raised_where_it_must():
    W, H, _ = problem(2, rows=5, n=40)
    H[1] = -0.05  # the lowest eigenvalue is 1.05 - 40 * 0.05
    H[1].diagonal().fill_(1.0)
    assert gptq_quantize(W, H).info.tolist() == [0, 1]
    q = gptq_quantize(W, H, damp_auto_increment=0.49)
    exact = reference.gptq_quantize(W.double(), H, damp_auto_increment=0.49)
    assert q.info.tolist() == [0, 0]
    assert torch.equal(q.codes[0], gptq_quantize(W, H).codes[0])
    assert (q.codes != exact.codes).double().mean() <= 3e-3


def test_inputs_never_seen_get_weight_zero():
    W, H, _ = problem(rows=6, n=40)
    H[:, 7] = H[7] = 0
    q = gptq_quantize(W, H, group_size=16)
    assert int(q.info) == -1 and (q.weight[:, 7] == 0).all() and (q.weight != 0).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(bad):
    W, H, _ = problem(2, rows=12, n=60)
    clean = gptq_quantize(W, H, group_size=16)
    W[1, 3, 20] = bad
    q = gptq_quantize(W, H, group_size=16)
    others = torch.ones(2, 12, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(q.codes[others], clean.codes[others]) and torch.equal(q.loss[others], clean.loss[others])
    assert q.weight[1, 3].isnan().all() and q.loss[1, 3].isnan()
    assert rtn_quantize(W, group_size=16).weight[1, 3].isnan().all()


def test_scales_below_float16_stay_positive():
    W, H, _ = problem(rows=6, n=40)
    q = gptq_quantize(W * 1e-7, H, group_size=16, scale_dtype=torch.float16)
    assert (q.scales > 0).all() and torch.equal(q.scales, q.scales.half().float())
    assert q.weight.isfinite().all() and q.loss.isfinite().all()
    tiny = gptq_quantize(W * 1e-42, H, group_size=16)
    assert (tiny.scales > 0).all() and tiny.weight.isfinite().all()


def test_symmetric_groups_of_one_sign():
    W = torch.tensor([[1.0, 2.0, 3.0, 7.5]])
    assert rtn_quantize(W).codes.tolist() == [[9, 10, 11, 15]]  # one step is 1
    authors = rtn_quantize(W, compat="authors")  # half a step, and what is above the middle clips
    assert authors.codes.tolist() == [[10, 12, 14, 15]] and authors.weight.max() == 3.5


def test_products_are_float32_whatever_the_setting():
    W, H, _ = problem(rows=8)
    want = gptq_quantize(W, H, group_size=32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(gptq_quantize(W, H, group_size=32).codes, want.codes)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("error, message, change", [
    (TypeError, "W must be a torch.Tensor", {"W": [1.0]}),
    (ValueError, r"W must have at least 2 dimensions", {"W": torch.ones(3)}),
    (ValueError, r"H must have shape .*\(8, 8\).*got \(4, 4\)", {"H": torch.eye(4)}),
    (TypeError, "H must be float64", {"H": torch.eye(8).int()}),
    (ValueError, "bits must be 2 to 8, got 9", {"bits": 9}),
    (ValueError, "bits must be 2 to 8, got True", {"bits": True}),
    (ValueError, "group_size must be positive, or -1", {"group_size": 0}),
    (ValueError, "block_size must be 1 to 128, got 256", {"block_size": 256}),
    (ValueError, "method must be one of", {"method": "awq"}),
    (ValueError, "needs D", {"method": "gptaq"}),
    (ValueError, "D goes with", {"D": torch.eye(8)}),
    (ValueError, "grid must be one of", {"grid": "fp8"}),
    (ValueError, "has 4 bits, got bits=3", {"grid": "mxfp4", "bits": 3}),
    (ValueError, "compat must be one of", {"compat": "x"}),
    (ValueError, "group_params must be one of", {"group_params": "x"}),
    (ValueError, "two orders", {"desc_act": True, "act_group_aware": True}),
    (ValueError, "zeros go with scales", {"zeros": torch.ones(3, 1)}),
    (ValueError, r"scales must have shape .*\(3, 1\), got \(3, 2\)", {"scales": torch.ones(3, 2)}),
    (ValueError, "mse must be 0", {"mse": -1.0}),
    (ValueError, "damp_percent must be 0 to 1", {"damp_percent": -0.1}),
    (ValueError, "scale_dtype must be one of", {"scale_dtype": torch.int8}),
])  # fmt: skip
def test_wrong_arguments(error, message, change):
    arguments = {"W": torch.randn(3, 8), "H": torch.eye(8)} | change
    with pytest.raises(error, match=message):
        gptq_quantize(arguments.pop("W"), arguments.pop("H"), **arguments)


@pytest.mark.parametrize("name", ["W", "H"])
def test_a_derivative_is_refused(name):
    arguments = {"W": torch.randn(3, 8), "H": torch.eye(8)}
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match="derivative"):
        gptq_quantize(arguments["W"], arguments["H"])
