# SPDX-License-Identifier: Apache-2.0
"""Divergence of two LM heads' laws, with the [T, V] logit matrices formed whole, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import Temperature
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
    temperature: Temperature = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    statistics: tuple[str, ...] = (),
    target: object | None = None,
    reference_hidden: Tensor | None = None,
    reference_lm_head_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    student_lora: tuple[Tensor, Tensor, float] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reference_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    topk_ids: Tensor | None = None,
    vocab_size: int | None = None,
) -> FusedLinearDivergence:
    """sum_t token_weights[t] * sum_j c_j[t] * D_j of the laws of h_T W_T' + b_T and h_S W_S' + b_S.

    Args:
        student_hidden: [T, Ds], any floating dtype; upcast to float64. Differentiable.
        student_lm_head_weight: [>= V, Ds], row = token. Differentiable.
        teacher_hidden: [T, Dt]; receives no gradient.
        teacher_lm_head_weight: [>= V, Dt]; receives no gradient.
        divergence, temperature, target, labels, label_weights, the softcaps and logit scales: as in
            `opd_kernels.reference.divergence`.
        token_weights: [T]; a weight of 0 makes the token's loss and gradients exactly 0, whatever
            its hidden state holds.
        reduction: "sum" (scalar) or "none" (its terms, [T]).
        statistics: names out of those that `opd_kernels.reference.divergence.statistics` returns.
        reference_hidden, reference_lm_head_weight: [T, Dr], [>= V, Dr]; no gradient.
        student_bias, teacher_bias, reference_bias: [>= V], added to the logits before anything
            else. The student's is differentiable.
        student_lora: (A [r, Ds], B [>= V, r], scaling): the student's head is W_S + scaling B A.
            A and B are differentiable.
        token_ids: [T], for the statistics student_logprobs and teacher_logprobs.
        topk_ids: [T, K], for the statistics student_topk_mass and teacher_topk_mass.
        vocab_size: V, the shared prefix of all vocabularies. Default: every row of the heads.

    Returns:
        FusedLinearDivergence, float64, nats.

    Source: the definitions of `opd_kernels.reference.divergences`; LoRA: arXiv:2106.09685.
    """
    student_logits = lm_head_logits(
        student_hidden,
        student_lm_head_weight,
        token_weights,
        vocab_size,
        bias=student_bias,
        lora=student_lora,
    )
    frozen = {}
    for side, hidden, head, bias in (
        ("teacher", teacher_hidden, teacher_lm_head_weight, teacher_bias),
        ("reference", reference_hidden, reference_lm_head_weight, reference_bias),
    ):
        if hidden is not None and head is not None:
            with torch.no_grad():
                frozen[side] = lm_head_logits(hidden, head, token_weights, vocab_size, bias=bias)
    shared = {
        "temperature": temperature,
        "token_weights": token_weights,
        "target": target,
        "reference_logits": frozen.get("reference"),
        "student_softcap": student_softcap,
        "teacher_softcap": teacher_softcap,
        "reference_softcap": reference_softcap,
        "student_logit_scale": student_logit_scale,
        "teacher_logit_scale": teacher_logit_scale,
        "reference_logit_scale": reference_logit_scale,
    }
    loss = _divergence(
        student_logits,
        frozen["teacher"],
        divergence=divergence,
        labels=labels,
        label_weights=label_weights,
        **shared,
    )
    named = {}
    if statistics:
        every = _statistics(
            student_logits, frozen["teacher"], token_ids=token_ids, topk_ids=topk_ids, **shared
        )
        named = {name: every[name] for name in statistics}
    return FusedLinearDivergence(loss.sum() if reduction == "sum" else loss, named)


def lm_head_logits(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_weights: Tensor | None,
    vocab_size: int | None,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """hidden @ (lm_head_weight + scaling B A)[:V]' + bias[:V], float64; rows of weight 0 are 0."""
    hidden = hidden.to(torch.float64)
    if token_weights is not None:
        skipped = (token_weights == 0).unsqueeze(-1)
        hidden = torch.where(skipped, torch.zeros_like(hidden), hidden)
    head = lm_head_weight[:vocab_size].to(torch.float64)
    if lora is not None:
        down, up, scaling = lora
        head = head + scaling * (up[:vocab_size].to(torch.float64) @ down.to(torch.float64))
    logits = hidden @ head.T
    return logits if bias is None else logits + bias[:vocab_size].to(torch.float64)
