# SPDX-License-Identifier: Apache-2.0
"""The largest log-probabilities under an LM head, the [T, V] logits formed whole, in float64."""

from __future__ import annotations

from torch import Tensor

from .fused_linear_divergence import lm_head_logits
from .topk_logprobs import TopkLogprobs, topk_logprobs


def fused_linear_topk(
    hidden: Tensor,
    lm_head_weight: Tensor,
    *,
    num_topk: int,
    token_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
) -> TopkLogprobs:
    """The num_topk most probable tokens of each position, and log of the mass of all others.

    z = cap(logit_scale * (hidden W' + bias)) / temperature, cap(x) = c tanh(x / c)

    Args:
        hidden: [T, D], any floating dtype; upcast to float64.
        lm_head_weight: [>= V, D], row = token.
        num_topk: K. Of equal logits the smaller id counts first.
        token_ids: [T] or [T, J] integers below V; negative is no id.
        temperature: divides the logits; > 0. A number or [T].
        bias: [>= V], added to the logits before anything else.
        softcap: c of cap; None for none.
        logit_scale: factor before cap.
        lora: (A [r, D], B [>= V, r], scaling): W is lm_head_weight + scaling B A.
        vocab_size: V. Default: every row of the head.

    Returns:
        TopkLogprobs without gradient, nats.

    Source: the definition of a softmax and of an order; LoRA: arXiv:2106.09685.
    """
    logits = lm_head_logits(hidden, lm_head_weight, None, vocab_size, bias=bias, lora=lora)
    return topk_logprobs(
        logits,
        num_topk,
        token_ids=token_ids,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )
