# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities under an LM head, the [T, V] logits formed whole, in float64."""

from __future__ import annotations

from torch import Tensor

from .fused_linear_divergence import lm_head_logits
from .token_logprobs import TokenLogprobs, token_logprobs


def fused_linear_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TokenLogprobs:
    """log softmax(hidden lm_head_weight' / temperature)[token_ids], with log-sum-exp and entropy.

    Args:
        hidden: [T, D], any floating dtype; upcast to float64. Differentiable.
        lm_head_weight: [>= V, D], row = token. Differentiable.
        token_ids: [T] integers in [0, V).
        temperature: divides the logits; > 0.
        vocab_size: V. Default: every row of the head.

    Returns:
        TokenLogprobs, [T] float64 each, nats.

    Source: the definition of a softmax.
    """
    logits = lm_head_logits(hidden, lm_head_weight, None, vocab_size)
    return token_logprobs(logits, token_ids, temperature=temperature)
