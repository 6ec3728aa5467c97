"""symmetry_param_groups: which update suits which parameter of a transformer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .mixed import UPDATES
from .roles import Found, find_roles


def symmetry_param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor = 0.02,
    weight_decay: float | Tensor = 0.0,
    momentum: float = 0.95,
    alpha: float = 0.0,
    adamw_lr: float | Tensor = 3e-4,
    adamw_weight_decay: float | Tensor = 0.0,
    per_head: bool = False,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    r"""Parameter groups of a transformer, each with the update that its symmetry suggests, for `SymmetryOptimizer`.

    ====================== =========================================================== ==============================
    role                   found by                                                    update
    ====================== =========================================================== ==============================
    embedding              `nn.Embedding`; embed_tokens, wte, tok_embeddings, ...      row_norm
    lm_head, tied          lm_head, embed_out, ...; shared with the embedding          row_norm, centred
    attention              q_proj, wq, query_key_value, c_attn, o_proj, dense, ...     muon (`per_head`: head by head)
    mlp_in                 gate_proj, up_proj, w1, w3, gate_up_proj, dense_h_to_4h ... hybrid, rows are neurons
    mlp_out                down_proj, w2, dense_4h_to_h, ...                           hybrid, columns are neurons
    experts_in, _out       the same names inside ``experts``, one by one or stacked    as mlp_in, mlp_out
    router                 ``gate`` beside ``experts``; ``router``                     left_polar, centred
    convolution            `nn.Conv*d`                                                 muon on (out, rest)
    norm, bias, vector,    norm modules; names in bias; fewer than 2 dimensions;       adamw
    position               wpe, position_embeddings, ...
    unknown matrix         any other parameter of 2 dimensions                         muon
    unknown tensor         any other parameter of more                                 adamw
    ====================== =========================================================== ==============================

    Layouts of Llama, GPT-2 and GPT-NeoX, Mixtral, OLMoE and gpt-oss are known. Frozen parameters are left out.

    Args:
        model: the model.
        lr: learning rate of all groups but AdamW's (default 0.02).
        weight_decay: likewise (default 0).
        momentum: likewise (default 0.95).
        alpha: exponent of the nuclear-norm scale of hybrid and left_polar updates. 0 (default) gives them, like all
            others here, a length that does not depend on the gradient's, so that one lr serves; the paper's
            experiments use 1 with a learning rate per role.
        adamw_lr: learning rate of AdamW's groups (default 3e-4).
        adamw_weight_decay: weight decay of AdamW's groups (default 0).
        per_head: orthogonalise attention matrices head by head; needs ``head_dim`` or ``num_heads`` (or a usual
            synonym) on the attention module or its ``config``.
        overrides: from a role, or a pattern of parameter names (`fnmatch`, ``"layers.0.*"``), to the name of an
            update or a dict of settings of the group (``{"update": "row_norm", "lr": 5e-3}``); later entries win.
        verbose: print the choice as a table.

    Returns:
        Groups with named parameters, ``update``, ``role``, ``lr`` and the other settings.

    Raises:
        ValueError: for an override that matches no parameter or names an unknown update, and for `per_head` where
            the number of heads cannot be found.

    Source: T. Lau, W. Su, Symmetry-Compatible Principle for Optimizer Design, arXiv 2605.18106. The authors' routing
    leaves the LM head's row norm uncentred.

    Example:
        >>> import torch
        >>> from gradops.optim import SymmetryOptimizer, symmetry_param_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.LayerNorm(16))
        >>> opt = SymmetryOptimizer(symmetry_param_groups(model))
        role       update    lr      tensors  parameters  names
        embedding  row_norm  0.02          1       1,600  0.weight
        norm       adamw     0.0003        2          32  1.weight, 1.bias
    """
    base = {"lr": lr, "weight_decay": weight_decay}
    adamw_base = {"lr": adamw_lr, "weight_decay": adamw_weight_decay}
    used: set[str] = set()
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for found in find_roles(model, per_head):
        settings = _update_of(found, momentum, alpha)
        if settings["update"] == "adamw":
            settings = adamw_base | settings
        else:
            settings = base | settings
        for pattern, change in (overrides or {}).items():
            if pattern == found.role or fnmatchcase(found.name, pattern):
                used.add(pattern)
                change = {"update": change} if isinstance(change, str) else dict(change)
                update = change.get("update", settings["update"])
                if update not in UPDATES:
                    known = ", ".join(UPDATES)
                    raise ValueError(f"overrides[{pattern!r}]: update must be one of {known}, got {update!r}")
                if update != settings["update"]:
                    settings = dict(adamw_base) if update == "adamw" else base | {"momentum": momentum}
                settings |= change
        key = (found.role, *sorted((name, _key(value)) for name, value in settings.items()))
        group = groups.setdefault(key, {"params": [], "role": found.role, **settings})
        group["params"].append((found.name, found.param))
    if unused := sorted(set(overrides or {}) - used):
        raise ValueError(f"overrides: {', '.join(map(repr, unused))} match neither a role nor a parameter name")
    if verbose:
        print(_table(list(groups.values())))
    return list(groups.values())


def _update_of(found: Found, momentum: float, alpha: float) -> dict[str, Any]:
    shape: dict[str, Any] = {"layout": found.layout} if found.layout != "matrix" else {}
    if found.heads is not None:
        shape["heads"] = found.heads
    role = found.role
    if role == "embedding":
        return {"update": "row_norm", "momentum": momentum}
    if role in ("lm_head", "tied"):
        return {"update": "row_norm", "momentum": momentum, "center": True}
    if role == "router":
        return {"update": "left_polar", "momentum": momentum, "center": True, "alpha": alpha}
    if role in ("mlp_in", "mlp_out", "experts_in", "experts_out") and found.rows_are_neurons:
        return {"update": "hybrid", "momentum": momentum, "alpha": alpha, **shape}
    if role in ("attention", "convolution", "unknown matrix", "experts_in", "experts_out"):
        return {"update": "muon", "momentum": momentum, **shape}
    return {"update": "adamw"}


def _key(value: Any) -> str:
    return f"tensor {id(value)}" if isinstance(value, Tensor) else repr(value)


def _table(groups: list[dict[str, Any]]) -> str:
    rows = [("role", "update", "lr", "tensors", "parameters", "names")]
    for group in groups:
        update = group["update"]
        settings = [
            f"{name}={value}" if not isinstance(value, bool) else name
            for name, value in group.items()
            if name in ("layout", "heads", "center") and value
        ]
        names = dict.fromkeys(re.sub(r"\b\d+(?=\.[^.]*\.)", "*", name) for name, _ in group["params"])
        rows.append(
            (
                group["role"],
                f"{update} ({', '.join(settings)})" if settings else update,
                f"{float(group['lr']):g}",
                str(len(group["params"])),
                f"{sum(p.numel() for _, p in group['params']):,}",
                ", ".join(names),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in (3, 4) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
