# SPDX-License-Identifier: Apache-2.0
"""loss[t] = w[t] sum_j c_j[t] D_j(P'[t], Q[t]), in float64; the target P' is the teacher or made of
teacher, student and reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import cross_entropy, evaluate, name_and_params

Temperature = float | Tensor | tuple[float | Tensor, float | Tensor]


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: object = "reverse_kl",
    temperature: Temperature = 1.0,
    token_weights: Tensor | None = None,
    target: object | None = None,
    reference_logits: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reference_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence between a target and the student's next-token law, per token.

    loss[t] = token_weights[t] * sum_j c_j[t] * D_j(p, q)
    q = softmax(z), p = softmax(y), or the target;
    z = cap(student_logit_scale * student_logits[t]) / temperature, cap(x) = c tanh(x / c);
    y likewise from the teacher's, r from the reference's (at the teacher's temperature).

    Args:
        student_logits: [T, >= V], any floating dtype; upcast to float64. Differentiable.
        teacher_logits: [T, >= V], any floating dtype; receives no gradient.
        divergence: a name, an object with `.name` and `.params`, or a sequence of
            (coefficient, one of these), a coefficient being a number or [T]. A coefficient of 0
            in a row adds exactly 0 there, whatever that component is.
        temperature: divides the logits; > 0. A number or [T]; a pair is (student, teacher). No
            implicit temperature**2 factor.
        token_weights: [T]; a weight of 0 makes loss and gradient exactly 0, whatever the row holds.
        target: None for the teacher; an object with `.student`, `.teacher`, `.reference`:
            softmax(student z + teacher y + reference r), or with `.teacher_weight` w, a number or
            [T]: w softmax(y) + (1 - w) q. `.detach`: no gradient through the student in it.
        reference_logits: [T, >= V], read only by a target with `.reference` other than 0.
        student_softcap, teacher_softcap, reference_softcap: c of cap; None for none.
        student_logit_scale, teacher_logit_scale, reference_logit_scale: factors before cap.
        labels: [T] or [T, K], for cross_entropy; negative = no label.
        label_weights: the shape of labels. Default: ones.
        vocab_size: V, the shared prefix of all vocabularies. Default: every column.

    Returns:
        [T] float64, nats. Not reduced.

    Source: the definitions of `opd_kernels.reference.divergences`; targets: TAID,
    arXiv:2501.16937, Veto, arXiv:2601.07155, G-OPD, arXiv:2602.12125, DistiLLM, arXiv:2402.03898.
    """
    weights = _weights(token_weights, student_logits)
    logits = {"student": student_logits, "teacher": teacher_logits, "reference": reference_logits}
    softcaps = {
        "student": student_softcap,
        "teacher": teacher_softcap,
        "reference": reference_softcap,
    }
    scales = {
        "student": student_logit_scale,
        "teacher": teacher_logit_scale,
        "reference": reference_logit_scale,
    }
    total = torch.zeros_like(weights)
    for coefficient, component in _components(divergence):
        factor = _per_token(coefficient, weights)
        skipped = (weights == 0) | (factor == 0)
        rows = _laws(logits, softcaps, scales, temperature, target, skipped, vocab_size)
        if name_and_params(component)[0] == "cross_entropy":
            value = cross_entropy(rows.student, *_labels(labels, label_weights, skipped))
        else:
            value = evaluate(component, rows.target, rows.student)
        factor = (weights * factor).masked_fill(skipped, 0.0)
        total = total + torch.where(skipped, torch.zeros_like(value), factor * value)
    return total


def statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 1.0,
    token_weights: Tensor | None = None,
    target: object | None = None,
    reference_logits: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reference_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    token_ids: Tensor | None = None,
    topk_ids: Tensor | None = None,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Every named statistic, [T] float64, unweighted, no gradient; 0 where the weight is 0.

    "teacher" is the geometric target if that is the target, and the teacher before a mixture.
    student_logprobs, teacher_logprobs: of token_ids [T]. student_topk_mass, teacher_topk_mass: the
    probability of topk_ids [T, K] together. A negative id counts 0.
    """
    with torch.no_grad():
        weights = _weights(token_weights, student_logits)
        rows = _laws(
            {"student": student_logits, "teacher": teacher_logits, "reference": reference_logits},
            {
                "student": student_softcap,
                "teacher": teacher_softcap,
                "reference": reference_softcap,
            },
            {
                "student": student_logit_scale,
                "teacher": teacher_logit_scale,
                "reference": reference_logit_scale,
            },
            temperature,
            None if hasattr(target, "teacher_weight") else target,
            weights == 0,
            vocab_size,
        )
        student, teacher = rows.student, rows.target
        same_top1 = rows.student_scaled.argmax(-1) == rows.target_scaled.argmax(-1)
        # NaN logits make no law, and so no best token
        undefined = student.isnan().any(-1) | teacher.isnan().any(-1)
        named = {
            "student_entropy": entropy(student),
            "teacher_entropy": entropy(teacher),
            "forward_kl": evaluate("forward_kl", teacher, student),
            "reverse_kl": evaluate("reverse_kl", teacher, student),
            "top1_agreement": same_top1.to(torch.float64).masked_fill(undefined, torch.nan),
            "student_lse": rows.student_scaled.logsumexp(-1),
            "teacher_lse": rows.target_scaled.logsumexp(-1),
        }
        if token_ids is not None:
            named["student_logprobs"] = _at(student, token_ids.unsqueeze(-1)).squeeze(-1)
            named["teacher_logprobs"] = _at(teacher, token_ids.unsqueeze(-1)).squeeze(-1)
        if topk_ids is not None:
            named["student_topk_mass"] = _at(student.exp(), topk_ids).sum(-1)
            named["teacher_topk_mass"] = _at(teacher.exp(), topk_ids).sum(-1)
        return {
            name: torch.where(weights == 0, torch.zeros_like(value), value)
            for name, value in named.items()
        }


def entropy(logprobs: Tensor) -> Tensor:
    """-sum_v q_v log q_v in nats, with 0 log 0 = 0."""
    probs = logprobs.exp()
    return -(probs * torch.where(probs > 0, logprobs, torch.zeros_like(logprobs))).sum(-1)


class _Laws(NamedTuple):
    """Log-probabilities [T, V], and the logits they come from, after every transformation."""

    student: Tensor
    target: Tensor
    student_scaled: Tensor
    target_scaled: Tensor


def _laws(
    logits: dict[str, Tensor | None],
    softcaps: dict[str, float | None],
    scales: dict[str, float],
    temperature: Temperature,
    target: object | None,
    skipped: Tensor,
    vocab_size: int | None,
) -> _Laws:
    """The student's law and the target; rows that are skipped become uniform before anything."""
    temperatures = temperature_pair(temperature)
    scaled = {}
    for side, raw in logits.items():
        if raw is None:
            continue
        raw = raw if side == "student" else raw.detach()
        raw = raw[..., :vocab_size].to(torch.float64)
        raw = torch.where(skipped.unsqueeze(-1), torch.zeros_like(raw), raw)
        divisor = _per_token(temperatures[0 if side == "student" else 1], skipped)
        divisor = divisor.masked_fill(skipped, 1.0).unsqueeze(-1)
        scaled[side] = _capped(scales[side] * raw, softcaps[side]) / divisor
    student = torch.log_softmax(scaled["student"], dim=-1)
    if target is None:
        target_scaled = scaled["teacher"]
    elif hasattr(target, "teacher_weight"):
        target_scaled = _mixture_logprobs(target, scaled["teacher"], student, skipped)
    else:
        target_scaled = _geometric_logits(target, scaled)
    law = torch.log_softmax(target_scaled, dim=-1)
    return _Laws(student, law, scaled["student"], target_scaled)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _geometric_logits(target: object, scaled: dict[str, Tensor]) -> Tensor:
    """sum of coefficient * logits over the models with a coefficient other than 0.

    A token that one of those models gives probability 0 has probability 0.
    """
    total = torch.zeros_like(scaled["student"])
    excluded = torch.zeros_like(total, dtype=torch.bool)
    streams = []
    for side in ("student", "teacher", "reference"):
        coefficient = float(getattr(target, side))
        if coefficient == 0:
            continue
        logits = scaled[side]
        if side == "student" and target.detach:  # type: ignore[attr-defined]
            logits = logits.detach()
        streams.append((coefficient, logits))
        excluded = excluded | (logits == -math.inf)
    for coefficient, logits in streams:
        total = total + coefficient * logits.masked_fill(excluded, 0.0)
    return total.masked_fill(excluded, -math.inf)


def _mixture_logprobs(
    target: object, teacher_scaled: Tensor, student: Tensor, skipped: Tensor
) -> Tensor:
    """log(w p + (1 - w) q), formed on probabilities; -inf where there is no mass."""
    weight = _per_token(target.teacher_weight, skipped)  # type: ignore[attr-defined]
    weight = weight.masked_fill(skipped, 1.0).unsqueeze(-1)
    if target.detach:  # type: ignore[attr-defined]
        student = student.detach()
    mass = weight * torch.log_softmax(teacher_scaled, dim=-1).exp() + (1.0 - weight) * student.exp()
    return mass.masked_fill(mass == 0, 1.0).log().masked_fill(mass == 0, -math.inf)


def _components(divergence: object) -> Sequence[tuple[float | Tensor, object]]:
    return divergence if isinstance(divergence, (tuple, list)) else ((1.0, divergence),)


def _per_token(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or [T] as [T] float64 without gradient."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    return torch.full(like.shape, float(value), dtype=torch.float64, device=like.device)


def _weights(token_weights: Tensor | None, student_logits: Tensor) -> Tensor:
    if token_weights is not None:
        return token_weights.detach().to(torch.float64)
    return torch.ones(student_logits.shape[:-1], dtype=torch.float64, device=student_logits.device)


def _labels(labels: Tensor, label_weights: Tensor | None, skipped: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [T, K]; no label in rows that are skipped."""
    labels = labels.to(torch.int64).reshape(*skipped.shape, -1)
    if label_weights is None:
        weights = torch.ones_like(labels, dtype=torch.float64)
    else:
        weights = label_weights.detach().to(torch.float64).reshape(labels.shape)
    return labels.masked_fill(skipped.unsqueeze(-1), -1), weights


def _at(values: Tensor, ids: Tensor) -> Tensor:
    """values[t, ids[t]], 0 where the id is negative."""
    ids = ids.to(torch.int64)
    return values.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)


def temperature_pair(temperature: Temperature) -> tuple[float | Tensor, float | Tensor]:
    """(student, teacher) temperatures from one or a pair."""
    if isinstance(temperature, (tuple, list)):
        student_temperature, teacher_temperature = temperature
        return student_temperature, teacher_temperature
    return temperature, temperature
