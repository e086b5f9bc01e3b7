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
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
) -> TokenLogprobs:
    """log softmax(z)[token_ids], with log-sum-exp and entropy.

    z = cap(logit_scale * (hidden W' + bias)) / temperature, cap(x) = c tanh(x / c)

    Args:
        hidden: [T, D], any floating dtype; upcast to float64. Differentiable.
        lm_head_weight: [>= V, D], row = token. Differentiable.
        token_ids: [T] integers in [0, V).
        temperature: divides the logits; > 0. A number or [T].
        bias: [>= V], added to the logits before anything else. Differentiable.
        softcap: c of cap; None for none.
        logit_scale: factor before cap.
        lora: (A [r, D], B [>= V, r], scaling): W is lm_head_weight + scaling B A. Differentiable.
        vocab_size: V. Default: every row of the head.

    Returns:
        TokenLogprobs, [T] float64 each, nats.

    Source: the definition of a softmax; LoRA: arXiv:2106.09685.
    """
    logits = lm_head_logits(hidden, lm_head_weight, None, vocab_size, bias=bias, lora=lora)
    return token_logprobs(
        logits, token_ids, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
