# SPDX-License-Identifier: Apache-2.0
"""Divergence of a sparse teacher and an LM head's law, [T, V] formed whole, in float64."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .fused_linear_divergence import lm_head_logits
from .topk_divergence import topk_divergence, topk_divergence_statistics


class FusedLinearTopkDivergence(NamedTuple):
    """loss: scalar or [T], nats. statistics: name -> [T], no gradient."""

    loss: Tensor
    statistics: dict[str, Tensor]


def fused_linear_topk_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tail_logprob: Tensor | None = None,
    divergence: object = "forward_kl",
    support: str = "teacher",
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    statistics: tuple[str, ...] = (),
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    student_lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
) -> FusedLinearTopkDivergence:
    """sum_t token_weights[t] * D of a teacher on its ids and the law of h W' + b.

    Args:
        student_hidden: [T, D], any floating dtype; upcast to float64. Differentiable.
        student_lm_head_weight: [>= V, D], row = token. Differentiable.
        teacher_ids, teacher_logprobs, tail_logprob, divergence, support, tail, temperature: as in
            `opd_kernels.reference.topk_divergence`.
        token_weights: [T]; 0 makes loss and gradients of the token exactly 0.
        reduction: "sum" (scalar) or "none" (its terms, [T]).
        statistics: names out of those that `topk_divergence_statistics` returns.
        student_bias: [>= V], added to the logits before anything else. Differentiable.
        student_softcap, student_logit_scale: of the logits.
        student_lora: (A [r, D], B [>= V, r], scaling): the head is W + scaling B A.
        vocab_size: V. Default: every row of the head.

    Returns:
        FusedLinearTopkDivergence, float64, nats.

    Source: the definitions of `opd_kernels.reference.divergences`; LoRA: arXiv:2106.09685.
    """
    logits = lm_head_logits(
        student_hidden,
        student_lm_head_weight,
        token_weights,
        vocab_size,
        bias=student_bias,
        lora=student_lora,
    )
    shared = {
        "tail_logprob": tail_logprob,
        "tail": tail,
        "temperature": temperature,
        "softcap": student_softcap,
        "logit_scale": student_logit_scale,
        "token_weights": token_weights,
    }
    loss = topk_divergence(
        logits, teacher_ids, teacher_logprobs, divergence=divergence, support=support, **shared
    )
    every = {}
    if statistics:
        every = topk_divergence_statistics(logits, teacher_ids, teacher_logprobs, **shared)
    return FusedLinearTopkDivergence(
        loss.sum() if reduction == "sum" else loss, {name: every[name] for name in statistics}
    )
