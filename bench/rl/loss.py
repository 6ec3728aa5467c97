"""Cases of the policy losses and off-policy corrections. Each loss is timed with its backward pass."""
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradops import rl

from ..harness import Case, Settings

ROWS, LENGTH = 64, 2048


def cases(settings: Settings) -> Iterator[Case]:
    yield from policy_loss(settings)
    yield from rollout_correction(settings)
    yield from replay_routing(settings)


def batch(settings: Settings) -> dict[str, Tensor]:
    """One update's tokens, padded to LENGTH: half of the places are tokens."""
    g = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(ROWS, LENGTH, generator=g)
    old = logp - torch.randn(ROWS, LENGTH, generator=g) / 8
    ref = logp + torch.randn(ROWS, LENGTH, generator=g) / 8
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=g)
    x = {"logp": logp, "old": old, "ref": ref, "mask": torch.arange(LENGTH) < lengths,
         "adv": torch.randn(ROWS, generator=g)}  # fmt: skip
    return {name: t.to(settings.device) for name, t in x.items()}


def packed(x: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = x["mask"]
    out = {name: t if name == "adv" else t[mask] for name, t in x.items() if name != "mask"}
    out["cu"] = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return out


def torch_policy_loss(kind: str, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, ref: Tensor | None) -> Tensor:
    """The losses as GRPOTrainer writes them."""
    adv = adv[:, None]
    log_ratio = logp - old
    if kind == "gspo":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    ratio = torch.exp(log_ratio)
    if kind == "cispo":
        loss = -ratio.clamp(max=5.0).detach() * adv * logp
    elif kind == "sapo":
        tau = torch.where(adv > 0, 1.0, 1.05)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * adv
    else:
        low, high = (3e-4, 4e-4) if kind == "gspo" else (0.2, 0.28) if kind == "dapo" else (0.2, 0.2)
        loss = -torch.min(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)
    if ref is not None:
        loss = loss + 0.1 * (torch.exp(ref - logp) - (ref - logp) - 1)
    if kind in ("dapo", "cispo"):
        return (loss * mask).sum() / mask.sum()
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def torch_packed_dapo(logp: Tensor, old: Tensor, adv: Tensor, cu: Tensor) -> Tensor:
    adv = adv.repeat_interleave(cu.diff())
    ratio = torch.exp(logp - old)
    return -torch.min(ratio * adv, ratio.clamp(0.8, 1.28) * adv).sum() / len(logp)


def with_gradient(loss: Callable[[Tensor], Tensor], logp: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    x = logp.clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        value = loss(x)
        return value, torch.autograd.grad(value, x)[0]

    return run


def gradient_error(exact: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[tuple[Tensor, Tensor]], float]:
    """||g - exact|| / ||exact|| of the gradient, in float64."""
    def error(result: tuple[Tensor, Tensor]) -> float:
        true = exact()[1]
        return float((result[1].double() - true).norm() / true.norm())

    return error


def verl_ppo(x: dict[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
    try:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        from verl.workers.config import ActorConfig
    except ImportError:
        return None
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, clip_ratio_c=3.0,
                         clip_ratio_low=0.2, clip_ratio_high=0.2)  # fmt: skip
    vanilla, adv, mask = get_policy_loss_fn("vanilla"), x["adv"][:, None].expand_as(x["logp"]), x["mask"].float()
    return lambda logp: vanilla(x["old"], logp, adv, mask, "token-mean", config, None)[0]


def torch_ppo(logp: Tensor, x: dict[str, Tensor]) -> Tensor:
    """Clip and dual clip as verl writes them."""
    adv = x["adv"][:, None]
    ratio = torch.exp((logp - x["old"]).clamp(-20, 20))
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    loss = torch.where(adv < 0, torch.min(-adv * 3.0, loss), loss)
    return (loss * x["mask"]).sum() / x["mask"].sum()


def policy_loss(settings: Settings) -> Iterator[Case]:
    x = batch(settings)
    y = packed(x)
    double = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}

    def case(variant: str, tokens: int, bytes_per_token: float, logp: Tensor, ours: Callable[[Tensor], Any],
             theirs: Callable[[Tensor], Tensor], exact: Callable[[], tuple[Tensor, Tensor]],
             peers: dict[str, Callable[[], Any]] | None = None) -> Case:
        return Case(
            "policy_loss", f"{tokens}", torch.float32, variant=variant,
            ours=with_gradient(lambda t: ours(t)[0], logp), reference=with_gradient(theirs, logp), peers=peers or {},
            # read logp and old_logp, write the derivative; the backward pass reads it and writes the gradient
            bytes=tokens * (20 + bytes_per_token), error=gradient_error(exact),
        )  # fmt: skip

    kinds = ["grpo"] if settings.quick else ["grpo", "dapo", "gspo", "cispo", "sapo"]
    for kind in kinds:
        for ref in [False] if settings.quick else [False, True]:
            options = {"ref_logp": x["ref"], "beta": 0.1} if ref else {}
            yield case(
                f"{kind} padded{' +kl' if ref else ''}", x["logp"].numel(), 5 if ref else 1, x["logp"],
                lambda t, k=kind, o=options: rl.policy_loss(t, x["old"], x["adv"], mask=x["mask"], kind=k, **o),
                lambda t, k=kind, r=ref: torch_policy_loss(k, t, x["old"], x["adv"], x["mask"],
                                                           x["ref"] if r else None),
                with_gradient(lambda t, k=kind, r=ref: torch_policy_loss(k, t, double["old"], double["adv"], x["mask"],
                                                                         double["ref"] if r else None),
                              double["logp"]),
            )  # fmt: skip
    theirs = verl_ppo(x)
    yield case(
        "ppo padded", x["logp"].numel(), 1, x["logp"],
        lambda t: rl.policy_loss(t, x["old"], x["adv"], mask=x["mask"], kind="ppo"), lambda t: torch_ppo(t, x),
        with_gradient(lambda t: torch_ppo(t, double), double["logp"]),
        {"verl": with_gradient(theirs, x["logp"])} if theirs else {},
    )  # fmt: skip
    yield case(
        "dapo packed", y["logp"].numel(), 0, y["logp"],
        lambda t: rl.policy_loss(t, y["old"], y["adv"], cu_seqlens=y["cu"], kind="dapo"),
        lambda t: torch_packed_dapo(t, y["old"], y["adv"], y["cu"]),
        with_gradient(lambda t: torch_packed_dapo(t, y["old"].double(), y["adv"].double(), y["cu"]),
                      y["logp"].double()),
    )  # fmt: skip


def torch_rollout(x: dict[str, Tensor], mode: str) -> tuple[Tensor, Tensor]:
    log_ratio, mask = x["logp"] - x["old"], x["mask"]
    if mode == "token_truncate":
        return torch.exp(log_ratio).clamp(max=2.0) * mask, mask
    mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    veto = ((log_ratio < math.log(1e-4)) & mask).any(-1, keepdim=True)
    ratio = torch.exp(mean)
    keep = mask & (ratio >= 0.999) & (ratio <= 1.001) & ~veto
    return ratio * keep, keep


def rollout_correction(settings: Settings) -> Iterator[Case]:
    x = batch(settings)
    for mode, options in (("token_truncate", {}), ("geometric_mask", {"low": 0.999, "high": 1.001, "veto": 1e-4})):
        yield Case(
            "rollout_correction", f"{x['logp'].numel()}", torch.float32, variant=mode,
            ours=lambda m=mode, o=options: rl.rollout_correction(x["logp"], x["old"], mask=x["mask"], mode=m, **o),
            reference=lambda m=mode: torch_rollout(x, m), bytes=x["logp"].numel() * 14.0,
        )  # fmt: skip


def replay_routing(settings: Settings) -> Iterator[Case]:
    """A composition of two torch operations: what is compared is the softmax over all experts, then gathered."""
    tokens, experts, chosen = 16384, 128, 8
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=g).to(settings.device).requires_grad_()
    ids = logits.detach().topk(chosen, -1).indices

    def theirs() -> Tensor:
        weights = logits.softmax(-1).gather(-1, ids)
        return torch.autograd.grad((weights / weights.sum(-1, keepdim=True)).square().sum(), logits)[0]

    yield Case(
        "replay_routing", f"{tokens}x{experts}", torch.float32, variant="top 8",
        ours=lambda: torch.autograd.grad(rl.replay_routing(logits, ids).square().sum(), logits)[0],
        reference=theirs, bytes=8.0 * logits.numel(),
    )  # fmt: skip
