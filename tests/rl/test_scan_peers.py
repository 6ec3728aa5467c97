"""The scans against the installed functions of verl and torchrl."""
import pytest
import torch

from gradops import rl


def tensors(*shape, n=1):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def flags(*shape, seed, probability=0.1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < probability


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_verl_multi_turn_gae(gamma, lam):
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    functional = pytest.importorskip("verl.utils.torch_functional")
    rewards, values = tensors(6, 50, n=2)
    mask = flags(6, 50, seed=1, probability=0.6)
    mask[:, 0] = True
    theirs, returns = core.compute_gae_advantage_return(rewards, values, mask.double(), gamma, lam)
    ours, our_returns = rl.gae(rewards, values, gamma=gamma, lam=lam, mask=mask)
    whitened = functional.masked_whiten(ours, mask.double())
    torch.testing.assert_close(whitened[mask], theirs[mask])
    torch.testing.assert_close(our_returns[mask], returns[mask])


@pytest.fixture
def functional():
    return pytest.importorskip("torchrl.objectives.value.functional")


def rollout(seed=0):
    """Rewards, values of each state and of the next, done and terminated flags; next values are consistent within an
    episode."""
    rewards, values, final = tensors(4, 60, n=3)
    terminated, truncated = flags(4, 60, seed=2), flags(4, 60, seed=3)
    cut = terminated | truncated
    cut[:, -1] = True
    next_values = torch.where(cut, final, values.roll(-1, 1))
    return rewards, values, next_values, terminated, truncated


def column(*xs):
    return [x[..., None] for x in xs]


def test_torchrl_gae(functional):
    rewards, values, next_values, terminated, truncated = rollout()
    v, n, r, done, end = column(values, next_values, rewards, terminated | truncated, terminated)
    want = functional.generalized_advantage_estimate(0.97, 0.9, v, n, r, done, end)
    ours = rl.gae(rewards, values, gamma=0.97, lam=0.9, terminated=terminated, truncated=truncated,
                  next_values=next_values)
    for x, y in zip(ours, want, strict=True):  # torchrl rounds gamma to float32, whatever the dtype
        torch.testing.assert_close(x, y[..., 0], rtol=1e-6, atol=1e-6)


def test_torchrl_lambda_returns(functional):
    rewards, _, next_values, terminated, truncated = rollout()
    n, r, done, end = column(next_values, rewards, terminated | truncated, terminated)
    want = functional.td_lambda_return_estimate(0.97, 0.9, n, r, done, end)
    ours = rl.lambda_returns(rewards, gamma=0.97, lam=0.9, terminated=terminated, truncated=truncated,
                             next_values=next_values)
    torch.testing.assert_close(ours, want[..., 0])


@pytest.mark.parametrize("rho_clip, c_clip", [(1.0, 1.0), (1.5, 0.8)])
def test_torchrl_vtrace(functional, rho_clip, c_clip):
    rewards, values, next_values, terminated, truncated = rollout()
    log_pi, log_mu = tensors(4, 60, n=2)
    p, m, v, n, r, done, end = column(log_pi, log_mu, values, next_values, rewards, terminated | truncated, terminated)
    want = functional.vtrace_advantage_estimate(0.97, p, m, v, n, r, done, end, rho_clip, c_clip)
    ours = rl.vtrace(rewards, values, log_pi - log_mu, gamma=0.97, terminated=terminated, truncated=truncated,
                     next_values=next_values, rho_clip=rho_clip, c_clip=c_clip)
    for x, y in zip(ours, want, strict=True):  # torchrl rounds gamma to float32, whatever the dtype
        torch.testing.assert_close(x, y[..., 0], rtol=1e-6, atol=1e-6)


def test_torchrl_reward_to_go(functional):
    rewards = tensors(4, 60)[0]
    done = flags(4, 60, seed=2)
    done[:, -1] = True
    r, d = column(rewards, done)
    want = functional.reward2go(r, d, 0.97)
    torch.testing.assert_close(rl.discounted_returns(rewards, 0.97, terminated=done), want[..., 0])
