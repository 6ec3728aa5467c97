import torch
from torch import Tensor

from ..router import RouterInfo


def router(logits: Tensor, *, capacity: int | None = None, top_k: int | None = None, n_steps: int = 20,
           gamma: float = 1.0, mode: str = "tokens_choose", lr: float = 1e-2) -> tuple[Tensor, Tensor, RouterInfo]:
    experts_choose = mode == "experts_choose"
    width = capacity if experts_choose else top_k
    assert width is not None
    x = logits if logits.dtype == torch.float64 else logits.float()
    masked = x == -torch.inf
    real = ~masked.all(-1)
    bad = ~(x < torch.inf).all((-2, -1))
    gates = x.masked_fill(~real[..., None], 0).softmax(-1)
    similarity = gates.masked_fill(masked, -torch.inf)
    tokens = real.to(x.dtype)
    experts = (tokens.sum(-1, keepdim=True) / x.shape[-1]).expand(*x.shape[:-2], x.shape[-1])
    # columns are along dimension -2 from here on, rows along -1
    a, b, similarity = (tokens, experts, similarity.mT) if experts_choose else (experts, tokens, similarity)
    alpha, m, v = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a)
    for step in range(1, n_steps + 1):
        d = project(similarity + alpha[..., None, :], width, b, gamma).sum(-2) - a
        grad = torch.where(d.abs() > 64 * torch.finfo(x.dtype).eps * a, d, 0)  # no steps along rounding errors
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad**2
        alpha = alpha - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    values = similarity + alpha[..., None, :]
    plan = project(values, width, b, gamma)
    value = (alpha * a).sum(-1) - (plan * (values.clamp(min=-1e3) - gamma / 2 * plan)).sum((-2, -1))
    residual = (plan.sum(-2) - a).abs().sum(-1) / a.sum(-1).clamp(min=1e-30)
    plan = plan.mT if experts_choose else plan
    overflow = torch.zeros_like(real, dtype=torch.int64)
    if capacity is not None and not experts_choose:
        rank = plan.argsort(dim=-2, descending=True, stable=True).argsort(-2)
        refused = (plan > 0) & (rank >= capacity)
        overflow = refused.sum(-1)
        plan = plan.masked_fill(refused, 0)
    plan = plan.masked_fill(bad[..., None, None], 0)
    routed = plan > 0
    indices, weights, shares = slots(routed, gates, plan, width, experts_choose)
    weights, shares = (t.masked_fill(bad[..., None, None], torch.nan) for t in (weights, shares))
    taken = routed.sum(-1)
    dropped = torch.where(bad, x.shape[-2], ((taken == 0) & real).sum(-1))
    overflow = overflow.masked_fill(bad[..., None], 0)
    residual, value = (t.double().masked_fill(bad, torch.nan) for t in (residual, value))
    info = RouterInfo(shares, routed.sum(-2), taken, overflow, dropped, residual, value)
    return indices, weights.to(logits.dtype), info


def project(x: Tensor, k: int, mass: Tensor, gamma: float) -> Tensor:
    """The k-sparse plan of each column (along the last dimension); ties to the first row."""
    k = min(k, x.shape[-1])
    values, rows = x.sort(dim=-1, descending=True, stable=True)
    d = (values[..., :k] - values[..., :1]).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    size = torch.arange(1, k + 1, dtype=x.dtype, device=x.device)
    tau = ((d.cumsum(-1) - gamma * mass[..., None]) / size).amax(-1, keepdim=True) if k else 0
    t = ((d - tau).nan_to_num(nan=0) / gamma).clamp(min=0)
    return torch.zeros_like(x).scatter(-1, rows[..., :k], t)


def slots(routed: Tensor, gates: Tensor, plan: Tensor, width: int,
          experts_choose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What is routed, as `width` slots of ascending indices for each token, or each expert."""
    if experts_choose:
        routed, gates, plan = routed.mT, gates.mT, plan.mT
    n = routed.shape[-1]
    places = torch.where(routed, torch.arange(n, device=routed.device), n)
    places = torch.nn.functional.pad(places.sort(-1).values, (0, width), value=n)[..., :width]
    used = places < n
    padded = [torch.nn.functional.pad(t, (0, 1)) for t in (gates, plan)]
    weights, shares = (torch.where(used, t.gather(-1, places), 0) for t in padded)
    return torch.where(used, places, -1), weights, shares
