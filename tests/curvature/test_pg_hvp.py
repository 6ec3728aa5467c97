"""The Hessian of the return of a policy, over every trajectory of a small decision process: exact in expectation."""
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp

from gradops.curvature import pg_hvp

S, A, H, GAMMA = 3, 3, 3, 0.9
GENERATOR = torch.Generator().manual_seed(0)
REWARD = torch.randn(S, A, generator=GENERATOR, dtype=torch.float64)
NEXT = torch.randint(S, (S, A), generator=GENERATOR)


def trajectories():
    """States, actions (27, 3) and the rewards to go, discounted from the start, of every trajectory."""
    actions = torch.tensor(list(itertools.product(range(A), repeat=H)))
    states = torch.zeros_like(actions)
    for t in range(1, H):
        states[:, t] = NEXT[states[:, t - 1], actions[:, t - 1]]
    rewards = REWARD[states, actions] * GAMMA ** torch.arange(H)
    return states, actions, rewards.flip(1).cumsum(1).flip(1)


STATES, ACTIONS, TO_GO = trajectories()
IDS = torch.arange(len(STATES)).repeat_interleave(H)


def policy(params, states):
    hidden = nn.functional.silu(params["table"][states])
    return hidden @ params["out"]


def parameters():
    g = torch.Generator().manual_seed(1)
    shapes = {"table": (S, 4), "out": (4, A)}
    return [{k: torch.randn(shape, generator=g, dtype=torch.float64) for k, shape in shapes.items()} for _ in range(2)]


def probabilities(params):
    return policy(params, STATES).log_softmax(-1).gather(2, ACTIONS[..., None])[..., 0].sum(1).exp()


def value(params):
    return (probabilities(params) * TO_GO[:, 0]).sum()


def close(a, b, tolerance=1e-12):
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


def weighted(params, baseline=0.0):
    return (probabilities(params)[:, None] * (TO_GO - baseline)).reshape(-1)


def test_expectation_is_the_hessian_of_the_return():
    params, v = parameters()
    exact_gradient, exact = jvp(grad(value), (params,), (v,))
    g, Bv = pg_hvp(policy, params, v, STATES.reshape(-1), ACTIONS.reshape(-1), weighted(params), IDS, reduction="sum")
    close(g, exact_gradient)
    close(Bv, exact)
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(2))  # steps in any order
    _, mixed = pg_hvp(policy, params, v, STATES.reshape(-1)[order], ACTIONS.reshape(-1)[order],
                      weighted(params)[order], 10 * IDS[order] - 7, reduction="mean")
    close({k: t * len(STATES) for k, t in mixed.items()}, exact)
    # A baseline of the state changes nothing in expectation.
    b = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)[STATES]
    close(pg_hvp(policy, params, v, STATES.reshape(-1), ACTIONS.reshape(-1), weighted(params, b), IDS,
                 reduction="sum")[1], exact)  # fmt: skip


def test_every_trajectory_has_its_own_product():
    params, v = parameters()
    batch = slice(0, 5)
    states, actions, weights = STATES[batch], ACTIONS[batch], TO_GO[batch]

    def one(i):
        logp = lambda p: policy(p, states[i]).log_softmax(-1).gather(1, actions[i][:, None])[:, 0]
        phi, score = lambda p: (weights[i] * logp(p)).sum(), lambda p: logp(p).sum()
        g, Hv = jvp(grad(phi), (params,), (v,))
        s = jvp(score, (params,), (v,))[1]
        return {k: g[k] * s + Hv[k] for k in g}, {k: -g[k] * s + Hv[k] for k in g}, g, s, Hv

    rows = [one(i) for i in range(5)]
    mean = lambda j: {k: sum(r[j][k] for r in rows) / 5 for k in params}
    g, Bv = pg_hvp(policy, params, v, states.reshape(-1), actions.reshape(-1), weights.reshape(-1),
                   torch.arange(5).repeat_interleave(H))
    close(Bv, mean(0))
    close(g, mean(2))
    # The two departures of the released code would be seen: a flipped sign, and a product of means.
    score = sum(r[3] for r in rows) / 5
    for wrong in (mean(1), {k: mean(2)[k] * score + mean(4)[k] for k in params}):
        assert max((wrong[k] - Bv[k]).abs().max() for k in params) > 1e-2


def test_distributions_and_modules():
    torch.manual_seed(0)
    model, obs, actions = nn.Linear(3, 2).double(), torch.randn(6, 3).double(), torch.randn(6, 2).double()
    ids, w = torch.tensor([0, 0, 0, 1, 1, 1]), torch.randn(6).double()
    v = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    normal = lambda m, obs: torch.distributions.Normal(m(obs), 0.5)  # (N, 2): independent dimensions
    got = pg_hvp((model, normal), None, v, obs, actions, w, ids)[1]

    params = {k: p.detach() for k, p in model.named_parameters()}
    logp = lambda p: torch.distributions.Normal(functional_call(model, p, (obs,)), 0.5).log_prob(actions).sum(1)
    score = torch.zeros(2).double().index_add(0, ids, jvp(logp, (params,), (v,))[1])[ids]
    extra = grad(lambda p: (w * score * logp(p)).sum() / 2)(params)
    plain = jvp(grad(lambda p: (w * logp(p)).sum() / 2), (params,), (v,))[1]
    close(got, {k: plain[k] + extra[k] for k in v})
    assert not any(t.requires_grad for t in got.values())


def test_refusals():
    params, v = parameters()
    states, actions, w = STATES.reshape(-1), ACTIONS.reshape(-1), TO_GO.reshape(-1)
    with pytest.raises(ValueError, match=r"trajectory_ids must have the shape of weights, \(81,\), got \(80,\)"):
        pg_hvp(policy, params, v, states, actions, w, IDS[1:])
    with pytest.raises(ValueError, match=r"actions must have shape \(N,\) = \(81,\), got \(80,\)"):
        pg_hvp(policy, params, v, states, actions[1:], w, IDS)
    with pytest.raises(ValueError, match=r"weights must have shape \(N,\) = \(81,\)"):
        pg_hvp(policy, params, v, states, actions, w[1:], IDS[1:])
    with pytest.raises(TypeError, match="trajectory_ids must be int32 or int64"):
        pg_hvp(policy, params, v, states, actions, w, IDS.float())
    with pytest.raises(ValueError, match="logits"):
        pg_hvp(lambda p, s: policy(p, s)[:, 0], params, v, states, actions, w, IDS)
    with pytest.raises(ValueError, match="depends on none of params"):
        pg_hvp(lambda p, s: REWARD[s], params, v, states, actions, w, IDS)
    with pytest.raises(ValueError, match="reduction must be one of"):
        pg_hvp(policy, params, v, states, actions, w, IDS, reduction="none")
    none = torch.zeros(0, dtype=torch.int64)
    g, Bv = pg_hvp(policy, params, v, none, none, w[:0], none)
    assert all((t == 0).all() for t in (*g.values(), *Bv.values()))
