"""compat= against the libraries' own code: TRL's and verl's as installed; OpenRLHF's formulas, written out.

Tolerances are theirs: they sum in float32.
"""
import inspect
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gradops.rl import group_advantages

N, G = 48, 6


def rewards(seed=0, columns=None, nan=0.0):
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(N, columns or 1, generator=g)
    r[torch.rand(r.shape, generator=g) < nan] = torch.nan
    r[:G] = r[:1]  # a group of equal rewards
    return r


def trl_lines(trainer, first, last):
    """The installed trainer's own lines from the one that starts with `first` to the one that starts with `last`."""
    lines = inspect.getsource(trainer._generate_and_score_completions).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i > begin and line.strip().startswith(last))
    return compile(textwrap.dedent("\n".join(lines[begin:end + 1])), inspect.getfile(trainer), "exec")


def trl_advantages(trainer, r, **settings):
    from trl.trainer.utils import nanstd

    names = {
        "self": SimpleNamespace(reward_weights=torch.ones(r.shape[1]), reward_funcs=[None] * r.shape[1], beta=0.0,
                                reward_clip_range=None, normalize_advantages=False, **settings),
        "torch": torch, "nanstd": nanstd, "rewards_per_func": r, "num_generations": G, "device": r.device,
        "mode": "train",
    }  # fmt: skip
    exec(trl_lines(trainer, "unscorable_mask =", "advantages = torch.nan_to_num"), names)
    return names["advantages"]


@pytest.mark.parametrize("nan", [0.0, 0.2])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trl_grpo(scale, nan):
    trl = pytest.importorskip("trl", exc_type=ImportError)
    r = rewards(nan=nan)
    want = trl_advantages(trl.GRPOTrainer, r, scale_rewards=scale, multi_objective_aggregation="sum_then_normalize")
    ours, same = group_advantages(r[:, 0], group_size=G, scale=scale, compat="trl")
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
    # TRL's equal rewards are zero by the luck of rounding, and its flag is for logging; ours are exact.
    assert same[:G].all() and (ours[:G] == 0).all()


@pytest.mark.parametrize("nan", [0.0, 0.2])
def test_trl_gdpo(nan):
    trl = pytest.importorskip("trl", exc_type=ImportError)
    r = rewards(columns=3, nan=nan)
    want = trl_advantages(trl.GRPOTrainer, r, scale_rewards="group", multi_objective_aggregation="normalize_then_sum")
    ours, _ = group_advantages(r, group_size=G, preset="gdpo", compat="trl")
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nan", [0.0, 0.2])
def test_trl_rloo(nan):
    trl = pytest.importorskip("trl", exc_type=ImportError)
    r = rewards(nan=nan)
    want = trl_advantages(trl.RLOOTrainer, r)
    ours, _ = group_advantages(r[:, 0], group_size=G, preset="rloo", compat="trl")
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


VERL = {
    "grpo": ("compute_grpo_outcome_advantage", {}),
    "dr_grpo": ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("compute_rloo_outcome_advantage", {}),
    "opo": ("compute_opo_outcome_advantage", {}),
    "grpo_passk": ("compute_grpo_passk_outcome_advantage", {"config": {"norm_adv_by_std_in_grpo": True}}),
    "gdpo": ("compute_gdpo_outcome_advantage", {}),
}


@pytest.mark.parametrize("preset", VERL)
def test_verl(preset):
    core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    name, more = VERL[preset]
    g = torch.Generator().manual_seed(0)
    ids = torch.randperm(N, generator=g) % 9
    if preset != "grpo_passk":  # verl refuses a group of one there
        ids[3] = 1000
    lengths = torch.randint(1, 8, (N,), generator=g)
    mask = torch.arange(8) < lengths[:, None]
    scores = torch.zeros(N, 8)
    scores[:, 0] = torch.rand(N, generator=g)
    uids = np.array([f"uid-{i}" for i in ids.tolist()], dtype=object)
    want, _ = getattr(core, name)(scores.clone(), mask.float(), uids, **more)
    ours, _ = group_advantages(scores[:, 0], ids=ids, lengths=lengths, preset=preset, compat="verl")
    torch.testing.assert_close(ours[:, None] * mask, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "rloo"])
def test_openrlhf(preset):
    r = rewards()[G:, 0]
    v = r.reshape(-1, G)
    want = {"grpo": (v - v.mean(-1, keepdim=True)) / (v.std(-1, keepdim=True) + 1e-9),
            "dr_grpo": v - v.mean(-1, keepdim=True),
            "rloo": v - (v.sum(-1, keepdim=True) - v) / (G - 1)}[preset]  # fmt: skip
    ours, _ = group_advantages(r, group_size=G, preset=preset, compat="openrlhf")
    torch.testing.assert_close(ours, want.reshape(-1), rtol=1e-5, atol=1e-5)
