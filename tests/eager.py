# SPDX-License-Identifier: Apache-2.0
"""Eager torch on float32 logits (float64 for float64): the yardstick of accuracy.

What a careful user writes today: logits are upcast before log_softmax, the formulas are those of
`tests.eager_divergences`, gradients are autograd's, rounded to the input's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_kernels import targets
from tests.eager_divergences import FORMULAS, cross_entropy, mixture


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence,
    temperature=1.0,
    token_weights: Tensor | None = None,
    target: targets.Geometric | targets.Mixture | None = None,
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
    """[T] in float32 (float64): token weight x sum of coefficient x divergence, nats."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    pair = temperature if isinstance(temperature, (tuple, list)) else (temperature, temperature)
    sides = (
        (student_logits, student_softcap, student_logit_scale, pair[0]),
        (teacher_logits.detach(), teacher_softcap, teacher_logit_scale, pair[1]),
        (reference_logits, reference_softcap, reference_logit_scale, pair[1]),
    )
    ones = torch.ones(len(student_logits), dtype=dtype, device=student_logits.device)
    weights = ones if token_weights is None else token_weights.to(dtype)
    components = divergence if isinstance(divergence, (tuple, list)) else ((1.0, divergence),)
    total = torch.zeros_like(ones)
    for coefficient, component in components:
        factor = weights * coefficient
        skipped = (weights == 0) | (factor == 0)
        scaled = [
            None if side[0] is None else _scaled(*side, skipped, dtype, vocab_size)
            for side in sides
        ]
        student = torch.log_softmax(scaled[0], dim=-1)
        if component.name == "cross_entropy":
            kept = labels.masked_fill(skipped.reshape(-1, *(1,) * (labels.dim() - 1)), -1)
            value = cross_entropy(student, kept, label_weights)
        else:
            teacher = _target(target, scaled, student, skipped)
            value = FORMULAS[component.name](teacher, student, **dict(component.params))
        total = total + torch.where(skipped, 0.0, factor) * value.masked_fill(skipped, 0)
    return total


def laws(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature=1.0,
    token_weights: Tensor | None = None,
    target: targets.Geometric | targets.Mixture | None = None,
    reference_logits: Tensor | None = None,
    vocab_size: int | None = None,
    **keywords,
) -> tuple[Tensor, Tensor]:
    """(student, target) log-probabilities in float64, for the checks; rows of weight 0 uniform."""
    pair = temperature if isinstance(temperature, (tuple, list)) else (temperature, temperature)
    skipped = torch.zeros(len(student_logits), dtype=torch.bool, device=student_logits.device)
    if token_weights is not None:
        skipped = token_weights == 0
    streams = {"student": student_logits, "teacher": teacher_logits, "reference": reference_logits}
    scaled = [
        None
        if logits is None
        else _scaled(
            logits.detach(),
            keywords.get(f"{side}_softcap"),
            keywords.get(f"{side}_logit_scale", 1.0),
            pair[0] if side == "student" else pair[1],
            skipped,
            torch.float64,
            vocab_size,
        )
        for side, logits in streams.items()
    ]
    student = torch.log_softmax(scaled[0], dim=-1)
    return student, _target(target, scaled, student, skipped)


def _scaled(
    logits: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float | Tensor,
    skipped: Tensor,
    dtype: torch.dtype,
    vocab_size: int | None,
) -> Tensor:
    """cap(scale * logits) / temperature in `dtype`; skipped rows are 0."""
    logits = logits[:, :vocab_size].to(dtype).masked_fill(skipped.unsqueeze(-1), 0.0)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).masked_fill(skipped, 1.0).unsqueeze(-1)
    return logits / temperature


def _target(target, scaled: list[Tensor | None], student: Tensor, skipped: Tensor) -> Tensor:
    """Log-probabilities of what the student is compared with."""
    if target is None:
        return torch.log_softmax(scaled[1], dim=-1)
    if isinstance(target, targets.Mixture):
        weight = target.teacher_weight
        if isinstance(weight, Tensor):
            weight = weight.to(student.dtype).masked_fill(skipped, 1.0).unsqueeze(-1)
        student = student.detach() if target.detach else student
        return mixture(weight, torch.log_softmax(scaled[1], dim=-1), student)
    logits = torch.zeros_like(student)
    absent = torch.zeros_like(student, dtype=torch.bool)
    coefficients = (target.student, target.teacher, target.reference)
    used = [(c, x) for c, x in zip(coefficients, scaled, strict=True) if c]
    for coefficient, stream in used:
        absent = absent | (stream == -math.inf) if coefficient > 0 else absent
    for coefficient, stream in used:
        held = stream.detach() if stream is scaled[0] and target.detach else stream
        logits = logits + coefficient * held.masked_fill(absent, 0)
    return torch.log_softmax(logits.masked_fill(absent, -math.inf), dim=-1)


def fused_linear_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    token_weights: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_lm_head_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    student_lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
    **keywords,
) -> Tensor:
    """[T]: the [T, V] logit matrices from float32 GEMMs, then `divergence`."""
    shared = (token_weights, vocab_size)
    student = _logits(student_hidden, student_lm_head_weight, *shared, student_bias, student_lora)
    teacher = _logits(teacher_hidden, teacher_lm_head_weight, *shared, teacher_bias)
    if reference_hidden is not None:
        keywords["reference_logits"] = _logits(
            reference_hidden, reference_lm_head_weight, *shared, reference_bias
        )
    return divergence(student, teacher, token_weights=token_weights, **keywords)


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), [T] each."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    skipped = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    scaled = _scaled(logits, softcap, logit_scale, temperature, skipped, dtype, vocab_size)
    logprobs = torch.log_softmax(scaled, dim=-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs.masked_fill(probs == 0, 0.0)).sum(-1)
    chosen = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen, scaled.logsumexp(-1), entropy


def fused_linear_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
    **keywords,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), [T] each, through the whole [T, V] logit matrix."""
    logits = _logits(hidden, lm_head_weight, None, vocab_size, bias, lora)
    return token_logprobs(logits, token_ids, **keywords)


def _logits(
    hidden: Tensor,
    head: Tensor,
    token_weights: Tensor | None,
    vocab_size: int | None,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(dtype)
    if token_weights is not None:
        hidden = hidden.masked_fill((token_weights == 0).unsqueeze(-1), 0.0)
    logits = hidden @ head[:vocab_size].to(dtype).T
    if lora is not None:
        down, up, scaling = lora
        logits = logits + scaling * (hidden @ down.to(dtype).T) @ up[:vocab_size].to(dtype).T
    return logits if bias is None else logits + bias[:vocab_size].to(dtype)
