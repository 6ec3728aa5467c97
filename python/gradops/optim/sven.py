"""Steps along the truncated pseudoinverse of the per-sample Jacobian."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .._checks import check_number
from ..linalg import spectral_solve
from ..linalg._spectrum import check_filter
from .base import check_scalar, check_state_dtype, scalar, zeros_like_state
from .capture import Tape, check_losses, watching
from .resume import ResumingOptimizer
from .uses import Targets, Use, gram_of

_OWN = ("lr", "weight_decay")  # what may differ from group to group


class SvenInfo(NamedTuple):
    """Of the last step: all singular values of the Jacobian, falling, and how many were used; -1 if the rows or the
    Gram matrix were not finite, so that nothing was changed."""

    sigma: Tensor
    rank: Tensor


class Sven(ResumingOptimizer):
    r"""Moves along the truncated pseudoinverse of the per-sample Jacobian, which is never formed.

    .. math:: R_a = \ell_a^{\kappa / 2}, \qquad M = \frac{\partial R}{\partial \theta}, \qquad
              \theta \leftarrow (1 - \eta \lambda)\, \theta - \eta\, M^+ R

    With the Gram matrix :math:`G = M M^\top = U \operatorname{diag}(\sigma^2) U^\top` the step is
    :math:`M^\top w`, where :math:`w = U \operatorname{diag}(\varphi) U^\top R` comes from
    :func:`gradops.linalg.spectral_solve`: by default
    :math:`\varphi_i = 1/\sigma_i^2` for the first k singular values above ``rtol`` times the largest, else 0. G and
    :math:`M^\top w` are made from the layers' inputs and output gradients: one forward pass, one backward pass for the
    activations, and no second pass::

        opt = Sven(model.parameters(), lr=0.05, k=64)
        with opt.capture(model):
            losses = loss_fn(model(x), y)   # one per sample
        opt.step(losses)

    Rows are those of the authors' default, :math:`\kappa = 2`: the loss itself, for which a step at lr = 1 is half a
    Gauss-Newton step on squared errors; :math:`\kappa = 1` gives the whole step, with a row of zeros where the loss is
    0. Signed residuals may be passed in place of losses with :math:`\kappa = 2`; that is Gauss-Newton on them.

    With ``momentum`` :math:`\mu > 0` the step is SPRING's,
    :math:`\phi \leftarrow \mu \phi + M^+ (R - \mu M \phi)`, and :math:`\theta` moves by :math:`-\eta \phi`.

    Args:
        params: parameters or groups of them. ``lr`` and ``weight_decay`` may differ between groups, nothing else.
        lr: :math:`\eta`, a number or a tensor of one element.
        k: keep at most that many singular values; None for all.
        rtol, filter, damping, power: as of :func:`gradops.linalg.spectral_solve`: ``filter="tikhonov"`` with
            ``damping`` is Levenberg-Marquardt (minSR), ``power=0.5`` the half-inverse gradient.
        kappa: :math:`\kappa > 0`.
        momentum: :math:`\mu`, in [0, 1).
        microbatch: so many consecutive samples share a row, the mean of their losses before the power.
        weight_decay: :math:`\lambda`, decoupled, a number or a tensor of one element.
        state_dtype: of the momentum; by default the parameter's dtype, at least float32.

    Linear layers, 1-D and 2-D convolutions, embeddings, layer, RMS, group and instance norms and batch norms in
    evaluation mode go by rules of their own, called once or often, with samples along the first or the second
    dimension. Any other module (recurrent ones, attention, those with parameters of their own) is run again for its
    per-sample gradients, at most 256 MiB of them at a time. Dropout is right in between, and refused inside of these.
    Batch statistics, anything else that mixes samples, and a parameter used outside of its module raise and name the
    module or the parameter; the first step looks for the second with one more backward pass.

    After a step ``opt.info`` has ``sigma`` and ``rank``, tensors that nothing has waited for. A step whose rows or
    gradients are not finite changes nothing; its rank is -1.

    Source: Sven, "singular value descent" of the per-sample losses, with the Gram form of its authors; book-keeping
    after Bu et al., arXiv 2210.00038; SPRING after Goldshlager, Abrahamsen and Lin, arXiv 2401.10190. One step costs a
    forward and a backward pass, :math:`B^2 (d + p) / 2` multiply-adds per d x p layer in float64 and
    :math:`O(B^3)` for the eigenvectors, whatever k is.

    Example:
        >>> import torch
        >>> from gradops.optim import Sven
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([1.0, 3.0])
        >>> opt = Sven(model.parameters(), lr=1.0, kappa=1.0)
        >>> with opt.capture(model):
        ...     losses = (model(x)[:, 0] - y).square()
        >>> opt.step(losses)
        >>> torch.allclose(model(x)[:, 0], y, atol=1e-5)
        True
        >>> int(opt.info.rank)
        2
    """

    info: SvenInfo | None = None
    _tape: Tape | None = None

    def __init__(self, params: ParamsT, lr: float | Tensor = 0.05, *, k: int | None = None, rtol: float = 1e-3,
                 kappa: float = 2.0, filter: str = "hard", damping: float = 0.0, power: float = 1.0,
                 momentum: float = 0.0, microbatch: int = 1, weight_decay: float | Tensor = 0.0,
                 state_dtype: torch.dtype | None = None) -> None:
        super().__init__(params, {
            "lr": lr, "k": k, "rtol": rtol, "kappa": kappa, "filter": filter, "damping": damping, "power": power,
            "momentum": momentum, "microbatch": microbatch, "weight_decay": weight_decay, "state_dtype": state_dtype,
        })  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in _OWN:
            check_scalar(name, group[name])
        for name, value in self.param_groups[0].items() if group is not self.param_groups[0] else ():
            if name not in (*_OWN, "params", "param_names", "initial_lr") and group.get(name, value) != value:
                raise ValueError(f"{name} must be the same in every group, got {value!r} and {group[name]!r}")
        for name in ("kappa", "momentum"):
            check_number(group[name], name)
        if not 0 < group["kappa"] < float("inf"):
            raise ValueError(f"kappa must be > 0 and finite, got {group['kappa']!r}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']!r}")
        rows = group["microbatch"]
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ValueError(f"microbatch must be an integer >= 1, got {rows!r}")
        check_filter(group["k"], group["rtol"], 0.0, group["filter"], group["damping"], group["power"])
        check_state_dtype(group["state_dtype"])
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(f"params must be real and floating-point, got one of dtype {p.dtype}")

    @contextmanager
    def capture(self, model: nn.Module) -> Iterator[None]:
        """Watches the forward passes of `model` in the ``with`` block, for the next step."""
        self._tape = None
        with watching(model, (p for group in self.param_groups for p in group["params"])) as tape:
            yield
        self._tape = tape

    @torch.no_grad()
    def step(self, losses: Tensor) -> None:  # type: ignore[override]
        """One step from the per-sample losses ``(B,)`` that were made under :meth:`capture`."""
        check_losses(losses)
        if self._tape is None:
            raise RuntimeError("make the losses under `with opt.capture(model)`, once for each step")
        tape, self._tape = self._tape, None
        settings = self.param_groups[0]
        rows = _rows(losses, settings["kappa"], settings["microbatch"])
        uses = tape.uses(losses, rows)
        gram = gram_of(uses, rows)
        mu = settings["momentum"]
        residual = rows.detach().double()
        if mu:
            for use in uses:
                residual -= mu * use.jvp([self._momentum(p) for p in use.params])
        w, sigma, rank = spectral_solve(gram, residual, **{
            name: settings[name] for name in ("k", "rtol", "filter", "damping", "power")
        })
        self.info = SvenInfo(sigma, rank)
        if int(rank) >= 0:
            self._update(uses, w, mu)

    def _update(self, uses: list[Use], w: Tensor, mu: float) -> None:
        used = {p for use in uses for p in use.params}
        groups = [(scalar(group["lr"]), scalar(group["weight_decay"]), [p for p in group["params"] if p in used])
                  for group in self.param_groups]
        targets: Targets = {}
        for lr, _, params in groups:
            scaled = w if mu else -lr * w
            targets |= {p: (self._momentum(p) if mu else p, scaled) for p in params}
        for use in uses:
            use.prepare(targets)
        for lr, decay, params in groups:
            if params and (isinstance(decay, Tensor) or decay != 0):
                torch._foreach_mul_(params, 1 - lr * decay)
            if params and mu:
                torch._foreach_mul_([self._momentum(p) for p in params], mu)
        for use in uses:
            use.vjp_(targets)
        for lr, _, params in groups if mu else ():
            for p in params:
                p.sub_(lr * self._momentum(p))

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = zeros_like_state(p, self.param_groups[0])
        return state["momentum_buffer"]  # type: ignore[no-any-return]


def _rows(losses: Tensor, kappa: float, microbatch: int) -> Tensor:
    """The mean of each microbatch to the power of kappa / 2; a row without slope where that is 0 and kappa < 2."""
    if losses.shape[0] % microbatch:
        raise ValueError(f"microbatch must divide the number of losses, {losses.shape[0]}, got {microbatch}")
    with torch.enable_grad():
        means = losses if microbatch == 1 else losses.view(-1, microbatch).mean(1)
        if kappa == 2:
            return means
        zero = means == 0
        return torch.where(zero, 0, torch.where(zero, 1, means) ** (kappa / 2))
