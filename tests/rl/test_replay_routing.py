import pytest
import torch

from gradops.rl import reference, replay_routing


def example(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 16, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.rand(3, 5, 16, generator=g).argsort(-1)[..., :4]
    return logits, ids


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64(dtype, renormalize):
    logits, ids = example(dtype)
    for x in (logits, 100 * logits):
        got = replay_routing(x, ids.int(), renormalize=renormalize)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        want = reference.replay_routing(x.double(), ids, renormalize=False)
        if renormalize:  # not the quotient of tiny numbers
            want = x.double().gather(-1, ids).softmax(-1)
        # a logit of several hundred has an ulp of 6e-5 in float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4 if dtype != torch.float64 else 1e-11, atol=1e-30)


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_gradient_reaches_the_router(renormalize):
    logits, ids = example()
    x, ids = logits[0, :3].clone().requires_grad_(), ids[0, :3]

    def f(x):
        return replay_routing(x, ids, renormalize=renormalize)

    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (x,))
    grad, = torch.autograd.grad(f(x)[:, 0].sum(), x)
    recorded = torch.zeros_like(grad, dtype=torch.bool).scatter(-1, ids, True)
    assert (grad[recorded] != 0).all() and ((grad[~recorded] == 0) == renormalize).all()


def test_compiles_and_batches():
    logits, ids = example()
    compiled = torch.compile(lambda x, i: replay_routing(x, i) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, ids), replay_routing(logits, ids) * 2)
    torch.testing.assert_close(torch.vmap(replay_routing)(logits, ids), replay_routing(logits, ids))
    assert replay_routing(logits[:0], ids[:0]).shape == (0, 5, 4)


def test_bad_input():
    x, i = torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.long)
    for error, match, call in [
        (TypeError, "router_logits must be a torch.Tensor", lambda: replay_routing([1.0], i)),
        (TypeError, "recorded_ids must be int32 or int64", lambda: replay_routing(x, x)),
        (ValueError, r"recorded_ids must be \(..., K\) for router_logits \(..., E\)", lambda: replay_routing(x, i[:1])),
        (ValueError, r"recorded_ids must be in \[0, 4\), got -1", lambda: replay_routing(x, i - 1)),
        (ValueError, r"recorded_ids must be in \[0, 4\), got 4", lambda: replay_routing(x, i + 4)),
    ]:
        with pytest.raises(error, match=match):
            call()
