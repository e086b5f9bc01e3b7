# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn from a proposal under an LM head, the [T, V] logits formed whole, in float64."""

from __future__ import annotations

from torch import Tensor

from .fused_linear_divergence import lm_head_logits
from .sample_tokens import TokenSamples, sample_tokens


def fused_linear_sample_tokens(
    hidden: Tensor,
    lm_head_weight: Tensor,
    uniforms: Tensor,
    *,
    proposal_temperature: float = 1.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
) -> TokenSamples:
    """N draws per position, as distinct tokens whose weights are the law on average.

    z = cap(logit_scale * (hidden W' + bias)) / temperature, cap(x) = c tanh(x / c)

    Args:
        hidden: [T, D], any floating dtype; upcast to float64.
        lm_head_weight: [>= V, D], row = token.
        uniforms: [T, N] in [0, 1).
        proposal_temperature: the proposal is softmax(z / proposal_temperature).
        temperature: divides the logits; > 0. A number or [T].
        bias: [>= V], added to the logits before anything else.
        softcap: c of cap; None for none.
        logit_scale: factor before cap.
        lora: (A [r, D], B [>= V, r], scaling): W is lm_head_weight + scaling B A.
        vocab_size: V. Default: every row of the head.

    Returns:
        TokenSamples without gradient, nats.

    Source: arXiv:2503.16870; LoRA: arXiv:2106.09685.
    """
    logits = lm_head_logits(hidden, lm_head_weight, None, vocab_size, bias=bias, lora=lora)
    return sample_tokens(
        logits,
        uniforms,
        proposal_temperature=proposal_temperature,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )
