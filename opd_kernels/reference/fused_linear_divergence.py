# SPDX-License-Identifier: Apache-2.0
"""Divergence of two LM heads' laws, with both [T, V] logit matrices formed whole, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import divergence as _divergence
from .divergence import statistics as _statistics


class FusedLinearDivergence(NamedTuple):
    """loss: scalar or [T], nats. statistics: name -> [T], no gradient."""

    loss: Tensor
    statistics: dict[str, Tensor]


def fused_linear_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    divergence: object = "reverse_kl",
    temperature: float | tuple[float, float] = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    statistics: tuple[str, ...] = (),
    vocab_size: int | None = None,
) -> FusedLinearDivergence:
    """sum_t token_weights[t] * D(softmax(h_T W_T' / temperature), softmax(h_S W_S' / temperature)).

    Args:
        student_hidden: [T, Ds], any floating dtype; upcast to float64. Differentiable.
        student_lm_head_weight: [>= V, Ds], row = token. Differentiable.
        teacher_hidden: [T, Dt]; receives no gradient.
        teacher_lm_head_weight: [>= V, Dt]; receives no gradient.
        divergence: a name, or an object with `.name` and `.params`.
        temperature: divides both logits; > 0. A pair is (student, teacher).
        token_weights: [T]; a weight of 0 makes the token's loss and gradients exactly 0, whatever
            its hidden state holds.
        reduction: "sum" (scalar) or "none" (its terms, [T]).
        statistics: names out of those that `opd_kernels.reference.divergence.statistics` returns.
        vocab_size: V, the shared prefix of both vocabularies. Default: every row of both heads.

    Returns:
        FusedLinearDivergence, float64, nats.

    Source: the definitions of `opd_kernels.reference.divergences`.
    """
    student_logits = lm_head_logits(
        student_hidden, student_lm_head_weight, token_weights, vocab_size
    )
    teacher_logits = lm_head_logits(
        teacher_hidden.detach(), teacher_lm_head_weight.detach(), token_weights, vocab_size
    )
    loss = _divergence(
        student_logits,
        teacher_logits,
        divergence=divergence,
        temperature=temperature,
        token_weights=token_weights,
    )
    named = {}
    if statistics:
        every = _statistics(
            student_logits, teacher_logits, temperature=temperature, token_weights=token_weights
        )
        named = {name: every[name] for name in statistics}
    return FusedLinearDivergence(loss.sum() if reduction == "sum" else loss, named)


def lm_head_logits(
    hidden: Tensor, lm_head_weight: Tensor, token_weights: Tensor | None, vocab_size: int | None
) -> Tensor:
    """hidden @ lm_head_weight[:V]' in float64, rows of weight 0 zeroed first."""
    hidden = hidden.to(torch.float64)
    if token_weights is not None:
        skipped = (token_weights == 0).unsqueeze(-1)
        hidden = torch.where(skipped, torch.zeros_like(hidden), hidden)
    return hidden @ lm_head_weight[:vocab_size].to(torch.float64).T
