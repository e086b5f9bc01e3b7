# SPDX-License-Identifier: Apache-2.0
"""loss[t] = weight[t] * D(softmax(teacher_logits[t]), softmax(student_logits[t])), in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import evaluate


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: object = "reverse_kl",
    temperature: float | tuple[float, float] = 1.0,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence between the teacher's and the student's next-token laws, per token.

    loss[t] = token_weights[t] * D(p, q)
    p = softmax(teacher_logits[t] / temperature), q = softmax(student_logits[t] / temperature)

    Args:
        student_logits: [T, >= V], any floating dtype; upcast to float64. Differentiable.
        teacher_logits: [T, >= V], any floating dtype; receives no gradient.
        divergence: a name, or an object with `.name` and `.params`.
        temperature: divides both logits; > 0. A pair is (student, teacher). No implicit
            temperature**2 factor.
        token_weights: [T]; a weight of 0 makes loss and gradient exactly 0, whatever the row holds.
        vocab_size: V, the shared prefix of both vocabularies. Default: every column.

    Returns:
        [T] float64, nats. Not reduced.

    Source: the definitions of `opd_kernels.reference.divergences`.
    """
    student_logits, teacher_logits, weights = _prepare(
        student_logits, teacher_logits, token_weights, vocab_size
    )
    student_temperature, teacher_temperature = temperature_pair(temperature)
    student_logprobs = torch.log_softmax(student_logits / student_temperature, dim=-1)
    teacher_logprobs = torch.log_softmax(teacher_logits / teacher_temperature, dim=-1)
    loss = evaluate(divergence, teacher_logprobs, student_logprobs)
    return torch.where(weights == 0, torch.zeros_like(loss), loss * weights)


def statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Every named statistic, [T] float64, unweighted, no gradient; 0 where the weight is 0."""
    with torch.no_grad():
        student_logits, teacher_logits, weights = _prepare(
            student_logits, teacher_logits, token_weights, vocab_size
        )
        student_temperature, teacher_temperature = temperature_pair(temperature)
        student_scaled = student_logits / student_temperature
        teacher_scaled = teacher_logits / teacher_temperature
        student_logprobs = torch.log_softmax(student_scaled, dim=-1)
        teacher_logprobs = torch.log_softmax(teacher_scaled, dim=-1)
        same_top1 = student_scaled.argmax(-1) == teacher_scaled.argmax(-1)
        # NaN logits make no law, and so no best token
        undefined = student_logprobs.isnan().any(-1) | teacher_logprobs.isnan().any(-1)
        named = {
            "student_entropy": entropy(student_logprobs),
            "teacher_entropy": entropy(teacher_logprobs),
            "forward_kl": evaluate("forward_kl", teacher_logprobs, student_logprobs),
            "reverse_kl": evaluate("reverse_kl", teacher_logprobs, student_logprobs),
            "top1_agreement": same_top1.to(torch.float64).masked_fill(undefined, torch.nan),
            "student_lse": student_scaled.logsumexp(-1),
            "teacher_lse": teacher_scaled.logsumexp(-1),
        }
        return {
            name: torch.where(weights == 0, torch.zeros_like(value), value)
            for name, value in named.items()
        }


def entropy(logprobs: Tensor) -> Tensor:
    """-sum_v q_v log q_v in nats, with 0 log 0 = 0."""
    probs = logprobs.exp()
    return -(probs * torch.where(probs > 0, logprobs, torch.zeros_like(logprobs))).sum(-1)


def temperature_pair(temperature: float | tuple[float, float]) -> tuple[float, float]:
    """(student, teacher) temperatures from one number or a pair."""
    if isinstance(temperature, (tuple, list)):
        student_temperature, teacher_temperature = temperature
        return float(student_temperature), float(teacher_temperature)
    return float(temperature), float(temperature)


def _prepare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_weights: Tensor | None,
    vocab_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 logits cut to the shared vocabulary; rows of weight 0 are zeroed before any sum."""
    student = student_logits[..., :vocab_size].to(torch.float64)
    teacher = teacher_logits.detach()[..., :vocab_size].to(torch.float64)
    if token_weights is None:
        return student, teacher, torch.ones(student.shape[:-1], dtype=torch.float64)
    weights = token_weights.detach().to(torch.float64)
    skipped = (weights == 0).unsqueeze(-1)
    student = torch.where(skipped, torch.zeros_like(student), student)
    teacher = torch.where(skipped, torch.zeros_like(teacher), teacher)
    return student, teacher, weights
