"""How likely each permutation makes the answer, within its group."""
import torch
from torch import Tensor

from .._checks import check_device, check_floating, check_integers
from .._compiler import allow_in_graph
from .._op import refuse_derivative, register

_op = register("permutation_weights", vmap=False,
               fake=lambda logp, cu_seqlens, offsets, tau: logp.new_empty(
                   cu_seqlens.shape[0] - 1,
                   dtype=torch.float64 if logp.dtype == torch.float64 else torch.float32))


@allow_in_graph
def permutation_weights(answer_logp: Tensor, cu_seqlens: Tensor, *, offsets: Tensor | None = None,
                        group_size: int | None = None, tau: float = 1.0) -> Tensor:
    r"""Softmax, within each group, of the token-mean log-likelihoods of the answer.

    .. math::
        w_i = \frac{\exp(\bar\ell_i / \tau)}{\sum_j \exp(\bar\ell_j / \tau)}
            \propto p(y \mid x, z_i)^{1 / (|y| \tau)}, \qquad
        \bar\ell_i = \frac{1}{|y|} \sum_t \log p(y_t \mid y_{<t}, x, z_i)

    where the ``z_i`` of a group are permutations (or selections) sampled for one prompt.

    Args:
        answer_logp: ``(tokens,)``, the log-probabilities of the answers' tokens, answer after answer; float64, float32,
            bfloat16 or float16.
        cu_seqlens: ``(n + 1,)``, int32 or int64: answer ``i`` is ``answer_logp[cu_seqlens[i]:cu_seqlens[i + 1]]``.
        offsets: ``(groups + 1,)``, int32 or int64: group ``g`` is the answers ``offsets[g]`` to ``offsets[g + 1] - 1``.
        group_size: instead of ``offsets``, where all groups have one size.
        tau: temperature; 1 in the authors' code.

    Returns:
        ``(n,)``, summing to 1 in each group; float64 for float64 input, else float32. Constants of the M-step.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or sizes do not fit; or (CPU only; on CUDA the weights of that group are NaN) the
            offsets do not rise from 0 to the end, or an answer is empty.
        RuntimeError: a derivative is asked for.

    DRO, arXiv 2505.03075; the authors' code weighs by the softmax of minus the token-mean cross-entropy, as here. Sums
    in float64. Reads ``answer_logp`` once.

    Example:
        >>> import torch
        >>> from gradops.rl import permutation_weights
        >>> logp = torch.tensor([-1.0, -3.0, -2.0, -2.0, -2.0])
        >>> permutation_weights(logp, torch.tensor([0, 2, 5]), group_size=2)
        tensor([0.5000, 0.5000])
    """
    check_floating(answer_logp, "answer_logp")
    check_integers(cu_seqlens, "cu_seqlens")
    for name, x in (("answer_logp", answer_logp), ("cu_seqlens", cu_seqlens)):
        if x.dim() != 1:
            raise ValueError(f"{name} must have 1 dimension, got shape {tuple(x.shape)}")
    check_device(cu_seqlens, "cu_seqlens", answer_logp, "answer_logp")
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have at least 1 entry, got 0")
    refuse_derivative("permutation_weights", answer_logp=answer_logp)
    if (offsets is None) == (group_size is None):
        raise ValueError("give one of offsets and group_size")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    n = cu_seqlens.shape[0] - 1
    if group_size is not None:
        if group_size < 1 or n % group_size:
            raise ValueError(f"group_size must be positive and divide the number of answers, {n}, got {group_size}")
        offsets = torch.arange(0, n + 1, group_size, device=answer_logp.device)
    check_integers(offsets, "offsets")
    assert offsets is not None
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must have 1 dimension and at least 1 entry, got shape {tuple(offsets.shape)}")
    check_device(offsets, "offsets", answer_logp, "answer_logp")
    return _op(answer_logp, cu_seqlens.long(), offsets.long(), float(tau))
