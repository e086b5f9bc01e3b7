# SPDX-License-Identifier: Apache-2.0
"""sorted_l1 under two LM heads, the [T, V] logits formed whole, in float64."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .divergence import Temperature
from .fused_linear_divergence import lm_head_logits
from .sorted_l1 import sorted_l1


class FusedLinearSortedL1(NamedTuple):
    """loss: scalar or [T]; row_losses: [T], no gradient; float64."""

    loss: Tensor
    row_losses: Tensor


def fused_linear_sorted_l1(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    temperature: Temperature = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    student_log_scales: Tensor | None = None,
    teacher_log_scales: Tensor | None = None,
    pairs: tuple[Tensor, Tensor] | None = None,
    pair_weight: float = 0.0,
    rest_weight: float = 1.0,
    beta: float = 0.5,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
) -> FusedLinearSortedL1:
    """sum_t (or each) of `opd_kernels.reference.sorted_l1` on hidden W' + bias of both models.

    Args:
        student_hidden: [T, Ds], student_lm_head_weight: [>= Vs, Ds], student_bias: [>= Vs];
            any floating dtype, upcast to float64. Differentiable.
        teacher_hidden: [T, Dt], teacher_lm_head_weight: [>= Vt, Dt], teacher_bias: no gradient.
        reduction: "sum" or "none".
        The rest: as `sorted_l1`.

    Returns:
        FusedLinearSortedL1, float64.

    Source: ULD, arXiv:2402.12030.
    """
    student_logits = lm_head_logits(
        student_hidden, student_lm_head_weight, token_weights, student_vocab_size, bias=student_bias
    )
    teacher_logits = lm_head_logits(
        teacher_hidden.detach(),
        teacher_lm_head_weight.detach(),
        token_weights,
        teacher_vocab_size,
        bias=teacher_bias,
    )
    loss = sorted_l1(
        student_logits,
        teacher_logits,
        temperature=temperature,
        token_weights=token_weights,
        student_log_scales=student_log_scales,
        teacher_log_scales=teacher_log_scales,
        pairs=pairs,
        pair_weight=pair_weight,
        rest_weight=rest_weight,
        beta=beta,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
    )
    return FusedLinearSortedL1(loss.sum() if reduction == "sum" else loss, loss.detach())
