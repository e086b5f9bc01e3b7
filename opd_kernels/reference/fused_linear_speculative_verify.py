# SPDX-License-Identifier: Apache-2.0
"""Verification of drafts under two LM heads, both models' logits formed whole, in float64."""

from __future__ import annotations

from torch import Tensor

from .fused_linear_divergence import lm_head_logits
from .speculative_verify import SpeculativeVerification, speculative_verify


def fused_linear_speculative_verify(
    draft_token_ids: Tensor,
    student_hidden: Tensor | None,
    student_lm_head_weight: Tensor | None,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    uniforms: Tensor | None = None,
    mode: str = "rejection",
    num_draft: Tensor | None = None,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    top_k: int = 0,
    student_top_k: int | None = None,
    top_p: float = 1.0,
    student_top_p: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
    num_topk: int = 25,
    threshold: float | None = None,
    history: Tensor | None = None,
    with_acceptance: bool = False,
) -> SpeculativeVerification:
    """speculative_verify of logits = hidden W' + bias.

    Args:
        draft_token_ids: [B, G].
        student_hidden: [B, G, Ds], any floating dtype; upcast to float64. Or None with its head.
        student_lm_head_weight: [>= V, Ds], row = token.
        teacher_hidden: [B, G + 1, Dt]. teacher_lm_head_weight: [>= V, Dt].
        student_bias, teacher_bias: [>= V], added to the logits before anything else.
        student_lora: (A [r, Ds], B [>= V, r], scaling): the student's head is W + scaling B A.
        vocab_size: V. Default: every row of the heads.
        The rest: of speculative_verify.

    Returns:
        SpeculativeVerification without gradient, nats.

    Source: arXiv:2211.17192, 2302.01318, 2403.10444, 2410.11325, 2510.07842.
    """
    student_logits = None
    if student_hidden is not None:
        student_logits = lm_head_logits(
            student_hidden,
            student_lm_head_weight,
            None,
            vocab_size,
            bias=student_bias,
            lora=student_lora,
        )
    return speculative_verify(
        draft_token_ids,
        student_logits,
        lm_head_logits(teacher_hidden, teacher_lm_head_weight, None, vocab_size, bias=teacher_bias),
        uniforms=uniforms,
        mode=mode,
        num_draft=num_draft,
        temperature=temperature,
        student_temperature=student_temperature,
        top_k=top_k,
        student_top_k=student_top_k,
        top_p=top_p,
        student_top_p=student_top_p,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        num_topk=num_topk,
        threshold=threshold,
        history=history,
        with_acceptance=with_acceptance,
    )
