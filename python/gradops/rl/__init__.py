"""Policy-gradient operations. `reference` holds the same functions in plain PyTorch."""
from . import reference
from .linear_logprob import linear_logprob
from .one_token_rollout import one_token_rollout_loss
from .selective_log_softmax import selective_log_softmax
from .top_p_keep import top_p_keep

__all__ = ["linear_logprob", "one_token_rollout_loss", "reference", "selective_log_softmax", "top_p_keep"]
