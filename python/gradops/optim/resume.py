"""What all optimizers of this family do with checkpoints."""
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class ResumingOptimizer(Optimizer):
    """Its state keeps its own dtype when it is loaded."""

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that the state keeps its own dtype and is copied, not shared.

        torch casts floating-point state to the parameter's dtype, which would round float32 momentum of bfloat16
        parameters at every resume.
        """
        final: dict[str, Any] = {}

        def restore(optimizer: Optimizer) -> None:
            ids = [i for group in final["param_groups"] for i in group["params"]]
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in zip(ids, params, strict=True):
                for key, value in final["state"].get(i, {}).items():
                    if isinstance(value, Tensor):
                        optimizer.state[p][key] = value.to(device=p.device, copy=True)

        # Our hooks run after the caller's pre-hooks and before their post-hooks.
        before = self.register_load_state_dict_pre_hook(lambda _, sd: final.update(sd))
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
