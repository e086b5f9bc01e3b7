# SPDX-License-Identifier: Apache-2.0
"""Eager torch on float32 logits (float64 for float64): the yardstick of accuracy.

What a careful user writes today: logits are upcast before log_softmax, mixtures are formed with
logaddexp, gradients are autograd's, rounded to the input's dtype. Written apart from
`opd_kernels.reference`, which forms its mixtures on probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence,
    temperature: float | tuple[float, float] = 1.0,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """[T] in float32 (float64): token weight x divergence, nats."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    pair = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    student = student_logits[:, :vocab_size].to(dtype)
    teacher = teacher_logits.detach()[:, :vocab_size].to(dtype)
    if token_weights is not None:
        skipped = (token_weights == 0).unsqueeze(-1)
        student, teacher = student.masked_fill(skipped, 0.0), teacher.masked_fill(skipped, 0.0)
    student_logprobs = torch.log_softmax(student / pair[0], dim=-1)
    teacher_logprobs = torch.log_softmax(teacher / pair[1], dim=-1)
    loss = _FORMULAS[divergence.name](teacher_logprobs, student_logprobs, **dict(divergence.params))
    return loss if token_weights is None else loss * token_weights.to(dtype)


def fused_linear_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    **keywords,
) -> Tensor:
    """[T]: both [T, V] logit matrices from float32 GEMMs, then `divergence`."""
    student = _logits(student_hidden, student_lm_head_weight, token_weights, vocab_size)
    teacher = _logits(teacher_hidden, teacher_lm_head_weight, token_weights, vocab_size)
    return divergence(student, teacher, token_weights=token_weights, **keywords)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), [T] each."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits[:, :vocab_size].to(dtype) / temperature
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
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), [T] each, through the whole [T, V] logit matrix."""
    logits = _logits(hidden, lm_head_weight, None, vocab_size)
    return token_logprobs(logits, token_ids, temperature=temperature)


def _logits(
    hidden: Tensor, head: Tensor, token_weights: Tensor | None, vocab_size: int | None
) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(dtype)
    if token_weights is not None:
        hidden = hidden.masked_fill((token_weights == 0).unsqueeze(-1), 0.0)
    return hidden @ head[:vocab_size].to(dtype).T


def _kl(logprobs: Tensor, other: Tensor) -> Tensor:
    absent = logprobs == -math.inf
    return (logprobs.exp() * (logprobs.masked_fill(absent, 0) - other.masked_fill(absent, 0))).sum(
        -1
    )


def _mixture(weight: float, logprobs: Tensor, other: Tensor) -> Tensor:
    absent = (logprobs == -math.inf) & (other == -math.inf)
    first = logprobs.masked_fill(absent, 0) + math.log(weight)
    second = other.masked_fill(absent, 0) + math.log1p(-weight)
    return torch.logaddexp(first, second)


def _jsd(teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    mixture = _mixture(beta, teacher, student)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _skew_forward_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    return _kl(teacher, _mixture(alpha, teacher, student))


def _skew_reverse_kl(
    teacher: Tensor, student: Tensor, alpha: float = 0.1, detach_mixture: bool = False
) -> Tensor:
    mixture = _mixture(alpha, student, teacher)
    return _kl(student, mixture.detach() if detach_mixture else mixture)


_FORMULAS = {
    "forward_kl": _kl,
    "reverse_kl": lambda teacher, student: _kl(student, teacher),
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": lambda teacher, student: 0.5 * (teacher.exp() - student.exp()).abs().sum(-1),
}
