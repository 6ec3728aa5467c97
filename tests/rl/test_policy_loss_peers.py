"""policy_loss and rollout_correction against the loss functions of installed trl and verl, on random data."""
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from gradops.rl import policy_loss, rollout_correction


def batch(rows=6, length=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(rows, length, generator=g, dtype=torch.float64)
    old = logp - torch.randn(rows, length, generator=g, dtype=torch.float64) / 4
    ref = logp + 0.3 * torch.randn(rows, length, generator=g, dtype=torch.float64)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=g)
    return logp, old, ref, mask, torch.randn(rows, generator=g, dtype=torch.float64)


def agree(ours, theirs, logp, **tolerances):
    """Both take logp and return a loss: the same value and the same gradient."""
    x, y = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    a, b = ours(x), theirs(y)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b, **tolerances)
    torch.testing.assert_close(x.grad, y.grad, **tolerances)


def trl_loss(loss_type, logp, old, ref, mask, adv, *, level="token", beta=0.0, low=0.2, high=0.2, delta=None):
    """GRPOTrainer's own loss, with logp in the place of the model's output."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError).GRPOTrainer
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    args = SimpleNamespace(delta=delta, use_bias_correction_kl=False, sapo_temperature_pos=1.0,
                           sapo_temperature_neg=1.05, steps_per_generation=1)
    this = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta, args=args,
        loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=False, accelerator=accelerator,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        max_completion_length=mask.shape[1], _metrics={"train": defaultdict(list)})  # fmt: skip
    model = this.model = SimpleNamespace(training=True)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
              "completion_mask": mask.long(), "advantages": adv, "old_per_token_logps": old,
              "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()}  # fmt: skip
    return trainer._compute_loss(this, model, inputs)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo"])
def test_trl(kind):
    logp, old, ref, mask, adv = batch()
    ours = {"dr_grpo": {"normalizer": mask.numel()}, "cispo": {"clip_high": 0.5}}.get(kind, {})
    theirs = {"cispo": {"high": 1.5}, "dapo": {"high": 0.28}}.get(kind, {})  # cispo: the bound, not its distance to 1
    # TRL holds the temperatures of sapo in float32
    tolerances = {"rtol": 1e-6, "atol": 1e-6} if kind == "sapo" else {}
    for beta in (0.0, 0.1):
        agree(lambda x, b=beta: policy_loss(x, old, adv, mask=mask, kind=kind, ref_logp=ref, beta=b, **ours)[0],
              lambda x, b=beta: trl_loss(kind, x, old, ref, mask, adv, beta=b, **theirs), logp, **tolerances)


def test_trl_gspo():
    logp, old, ref, mask, adv = batch()
    agree(lambda x: policy_loss(x, old, adv, mask=mask, kind="gspo", ref_logp=ref, beta=0.1)[0],
          lambda x: trl_loss("grpo", x, old, ref, mask, adv, level="sequence", low=3e-4, high=4e-4, beta=0.1), logp)


def test_trl_delta_is_the_dual_clip():
    logp, old, ref, mask, adv = batch()
    agree(lambda x: policy_loss(x, old, adv, mask=mask, dual_clip=1.5)[0],
          lambda x: trl_loss("grpo", x, old, ref, mask, adv, delta=1.5), logp)


def verl_module(name):
    return pytest.importorskip(f"verl.trainer.ppo.{name}", exc_type=ImportError)


def verl_config():
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, clip_ratio_low=0.2,
                       clip_ratio_high=0.28, clip_ratio_c=3.0)


AGGREGATES = {"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean", "sequence_sum": "seq-mean-token-sum",
              "sum": "token-sum"}


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("kind, theirs", [("ppo", "vanilla"), ("gspo", "gspo"), ("sapo", "sapo"), ("cispo", "cispo"),
                                          ("reinforce", "gpg")])
def test_verl(kind, theirs, aggregate):
    core = verl_module("core_algos")
    if kind == "sapo" and aggregate != "sequence_mean":
        pytest.skip("verl's sapo has one aggregation")
    logp, old, _, mask, adv = batch()
    weights = torch.rand(mask.shape, dtype=torch.float64) * 2
    if kind == "gspo":  # verl's gradient is that of its loss only where a sequence has one weight and advantage
        weights = weights[:, :1].expand_as(weights)
    function, config = core.get_policy_loss_fn(theirs), verl_config()
    clips = {"clip_low": 0.2, "clip_high": 0.28} if kind in ("ppo", "gspo", "cispo") else {}
    tolerances = {"rtol": 1e-6, "atol": 1e-6}  # verl adds 1e-8 to denominators
    agree(
        lambda x: policy_loss(x, old, adv, mask=mask, kind=kind, aggregate=aggregate, is_weights=weights, **clips,
                              tau=(config.tau_pos, config.tau_neg))[0],
        lambda x: function(old, x, adv[:, None].expand_as(x), mask.double(), AGGREGATES[aggregate], config, weights)[0],
        logp, **tolerances)  # fmt: skip


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k1+", "k3+"])
def test_verl_kl(kl):
    core = verl_module("core_algos")
    logp, old, ref, mask, adv = batch()
    agree(lambda x: policy_loss(x, old, 0 * adv, mask=mask, kind="bnpo", ref_logp=ref, kl=kl, beta=1.0)[0],
          lambda x: (core.kl_penalty(x, ref, kl) * mask).sum() / mask.sum(), logp)  # fmt: skip


@pytest.mark.parametrize("mode, spec", [("token_truncate", 1.3), ("sequence_truncate", 1.3), ("token_mask", "0.8_1.3"),
                                        ("sequence_mask", "0.2_1.3")])
def test_verl_rollout_weights(mode, spec):
    helper = verl_module("rollout_corr_helper")
    logp, old, _, mask, _ = batch()
    low, high = (float(x) for x in spec.split("_")) if isinstance(spec, str) else (None, spec)
    weights, _ = rollout_correction(logp, old, mask=mask, mode=mode, low=low, high=high)
    theirs, _ = helper.compute_rollout_correction_weights((logp - old) * mask, mask.double(), mode.split("_")[0], spec)
    torch.testing.assert_close(weights, theirs)


def test_verl_geometric_rejection():
    helper = verl_module("rollout_corr_helper")
    logp, old, _, mask, _ = batch()
    _, keep = rollout_correction(logp, old, mask=mask, mode="geometric_mask", low=0.9, high=1.2)
    # verl bounds the inverse ratio
    theirs, _ = helper.compute_rollout_rejection_mask((logp - old) * mask, mask.double(), "seq_mean_k1",
                                                      f"{1 / 1.2}_{1 / 0.9}")  # fmt: skip
    assert torch.equal(keep, theirs.bool()) and 0 < keep.sum() < mask.sum()
