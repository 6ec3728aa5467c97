"""Plain PyTorch twins of this family's functions: slow, any dtype, the yardstick of every test."""
from .linear import linear_logprob, one_token_rollout_loss
from .logp import selective_log_softmax, top_p_keep

__all__ = ["linear_logprob", "one_token_rollout_loss", "selective_log_softmax", "top_p_keep"]
