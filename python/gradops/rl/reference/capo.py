"""CAPO as it is usually written: the gradients of every token as [N, K, H] tensors."""
import torch
from torch import Tensor

PRESETS = {"capo": (1e-2, 1e-4), "dr_capo": (5e-4, 1e-3), "reincapo": (1e-1, 1e-5)}  # tau_h, tau_f


def _residual(probs: Tensor, action_index: Tensor) -> Tensor:
    """e_a - p; without e_a where the action is outside the support."""
    return (torch.arange(probs.shape[-1], device=probs.device) == action_index[..., None]).to(probs.dtype) - probs


def capo_curvature(hidden: Tensor, probs: Tensor, action_index: Tensor, advantages: Tensor, *, model: str = "sgd",
                   token_ids: Tensor | None = None, exp_avg: Tensor | None = None, exp_avg_sq: Tensor | None = None,
                   betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                   step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    v = _residual(probs, action_index)
    gradient = advantages[..., None, None] * v[..., :, None] * hidden[..., None, :]
    direction = gradient
    if model == "adam":
        assert token_ids is not None and exp_avg is not None and exp_avg_sq is not None
        first = betas[0] * exp_avg[token_ids] + (1 - betas[0]) * gradient
        second = betas[1] * exp_avg_sq[token_ids] + (1 - betas[1]) * gradient.square()
        first, second = first / (1 - betas[0] ** (step + 1)), second / (1 - betas[1] ** (step + 1))
        direction = first / (second.sqrt() + eps)
    u = (direction * hidden[..., None, :]).sum(-1)
    along = (v * u).sum(-1)
    fisher = torch.diag_embed(probs) - probs[..., :, None] * probs[..., None, :]
    spread = (u[..., None, :] @ fisher @ u[..., :, None])[..., 0, 0]
    return advantages * along, advantages * (along.square() - spread), along.square()


def capo_curvature_sgd(hidden: Tensor, logp: Tensor, sum_p2: Tensor, sum_p3: Tensor,
                       advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = logp.exp()
    squares = 1 - 2 * p + sum_p2
    spread = p - 2 * p.square() + sum_p3 - (p - sum_p2).square()
    scale = advantages * hidden.square().sum(-1)
    return (advantages * scale * squares, advantages * scale.square() * (squares.square() - spread),
            (scale * squares).square())


def capo_mask(grad_dot: Tensor, hess: Tensor, fisher: Tensor, *, preset: str = "capo", lr: float = 1.5e-5,
              tau_h: float | None = None, tau_f: float | None = None, symmetric: bool = True) -> Tensor:
    tau_h = PRESETS[preset][0] if tau_h is None else tau_h
    tau_f = PRESETS[preset][1] if tau_f is None else tau_f
    change = lr * grad_dot + 0.5 * lr**2 * hess
    divergence = 0.5 * lr**2 * fisher
    return (divergence < tau_f) & (change < tau_h) & (change > -tau_h if symmetric else change >= 0)


def capo_update_moments_(exp_avg: Tensor, exp_avg_sq: Tensor, hidden: Tensor, probs: Tensor, action_index: Tensor,
                         advantages: Tensor, token_ids: Tensor, mask: Tensor, *,
                         betas: tuple[float, float] = (0.9, 0.999), reduction: str = "mean") -> None:
    hidden, probs, token_ids = hidden[mask], probs[mask], token_ids[mask]
    advantages = advantages[mask] / (max(1, int(mask.sum())) if reduction == "mean" else 1)
    weights = advantages[:, None] * _residual(probs, action_index[mask])
    per_token = weights[..., None] * hidden.to(weights.dtype)[:, None, :]
    gradient = torch.zeros(exp_avg.shape, dtype=weights.dtype, device=hidden.device)
    gradient.index_add_(0, token_ids.flatten(), per_token.flatten(0, 1))
    touched = token_ids.unique()
    exp_avg[touched] = (betas[0] * exp_avg[touched] + (1 - betas[0]) * gradient[touched]).to(exp_avg.dtype)
    exp_avg_sq[touched] = (betas[1] * exp_avg_sq[touched]
                           + (1 - betas[1]) * gradient[touched].square()).to(exp_avg_sq.dtype)
