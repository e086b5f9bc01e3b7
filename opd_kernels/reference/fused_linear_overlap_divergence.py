# SPDX-License-Identifier: Apache-2.0
"""Divergence of two LM heads' laws on the tokens that both vocabularies have, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import Temperature, divergence, temperature_pair
from .divergence import statistics as _statistics
from .fused_linear_divergence import lm_head_logits

_evaluate = divergence


class FusedLinearOverlapDivergence(NamedTuple):
    """loss: scalar or [T], nats. statistics: name -> [T], no gradient."""

    loss: Tensor
    statistics: dict[str, Tensor]


def fused_linear_overlap_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    *,
    divergence: object = "reverse_kl",
    tail: str = "bucket",
    student_extra_logits: Tensor | None = None,
    teacher_extra_logits: Tensor | None = None,
    temperature: Temperature = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    statistics: tuple[str, ...] = (),
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
) -> FusedLinearOverlapDivergence:
    """sum_t token_weights[t] * D of two laws on cells: a pair of shared tokens each, and one more.

    Args:
        student_hidden: [T, Ds], student_lm_head_weight: [>= Vs, Ds]; upcast to float64.
            Differentiable.
        teacher_hidden: [T, Dt], teacher_lm_head_weight: [>= Vt, Dt]; no gradient.
        student_ids, teacher_ids: [M], the pairs; None for both: every token with itself.
        divergence, temperature: as in `opd_kernels.reference.divergence`, without cross_entropy.
        tail: "bucket": the last cell has the mass of all tokens that are not shared;
            "renormalize_both": no such cell; "renormalize_teacher": empty on the teacher's side.
        student_extra_logits, teacher_extra_logits: [T], of one more cell; before the temperature.
        token_weights: [T]; 0 makes loss and gradients of the token exactly 0.
        reduction: "sum" (scalar) or "none" (its terms, [T]).
        statistics: names out of student_entropy, teacher_entropy, forward_kl, reverse_kl,
            top1_agreement, of the cells, and student_mass, teacher_mass, of the shared tokens.
        student_bias, teacher_bias: [>= V], added to the logits before anything else.
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: of the logits.
        student_vocab_size, teacher_vocab_size: Vs, Vt. Default: every row of the head.

    Returns:
        FusedLinearOverlapDivergence, float64, nats.

    Source: the definitions of `opd_kernels.reference.divergences` on the cells of a partition.
    """
    skipped = None if token_weights is None else token_weights == 0
    temperatures = [
        value.masked_fill(skipped, 1.0)
        if isinstance(value, Tensor) and skipped is not None
        else value
        for value in temperature_pair(temperature)
    ]
    student = _logits(
        lm_head_logits(
            student_hidden,
            student_lm_head_weight,
            token_weights,
            student_vocab_size,
            bias=student_bias,
        ),
        student_softcap,
        student_logit_scale,
        temperatures[0],
    )
    with torch.no_grad():
        teacher = _logits(
            lm_head_logits(
                teacher_hidden,
                teacher_lm_head_weight,
                token_weights,
                teacher_vocab_size,
                bias=teacher_bias,
            ),
            teacher_softcap,
            teacher_logit_scale,
            temperatures[1],
        )
    sides, masses = [], []
    for logits, ids, extra, divisor in (
        (student, student_ids, student_extra_logits, temperatures[0]),
        (teacher, teacher_ids, teacher_extra_logits, temperatures[1]),
    ):
        ids = torch.arange(logits.shape[1], device=logits.device) if ids is None else ids
        shared = logits[:, ids.long()]
        is_other = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        is_other[ids.long()] = False
        rest = logits[:, is_other].logsumexp(-1) if bool(is_other.any()) else None
        masses.append((shared.logsumexp(-1) - logits.logsumexp(-1)).exp())
        sides.append((shared, rest, extra, divisor))
    has_rest = tail != "renormalize_both" and any(rest is not None for _, rest, _, _ in sides)
    tables = []
    for i, (shared, rest, extra, divisor) in enumerate(sides):
        cells = [shared]
        if has_rest:
            empty = rest is None or (i == 1 and tail == "renormalize_teacher")
            cells.append((shared[:, :1] * 0 - math.inf) if empty else rest.unsqueeze(-1))
        if extra is not None:
            given = extra.to(torch.float64)
            if skipped is not None:
                given = torch.where(skipped, 0.0, given)
            cells.append((given / divisor).unsqueeze(-1))
        tables.append(torch.cat(cells, dim=-1))
    loss = _evaluate(*tables, divergence=divergence, token_weights=token_weights)
    every = {}
    if statistics:
        every = _statistics(*tables, token_weights=token_weights)
        for name, mass in zip(("student_mass", "teacher_mass"), masses, strict=True):
            mass = mass.detach()
            every[name] = mass if skipped is None else mass.masked_fill(skipped, 0.0)
    return FusedLinearOverlapDivergence(
        loss.sum() if reduction == "sum" else loss, {name: every[name] for name in statistics}
    )


def _logits(
    logits: Tensor, softcap: float | None, logit_scale: float, temperature: float | Tensor
) -> Tensor:
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.double().unsqueeze(-1)
    return logits / temperature
