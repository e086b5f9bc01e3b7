# SPDX-License-Identifier: Apache-2.0
"""rest_weight * sum_i |p_(i) - q_(i)| + pair_weight * sum JSD_beta(p_w, q_v), in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import Temperature


def sorted_l1(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 1.0,
    token_weights: Tensor | None = None,
    student_log_scales: Tensor | None = None,
    teacher_log_scales: Tensor | None = None,
    pairs: tuple[Tensor, Tensor] | None = None,
    pair_weight: float = 0.0,
    rest_weight: float = 1.0,
    beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
) -> Tensor:
    """L1 distance of two sorted laws, padded with zeros to one length, and a JSD of known pairs.

    loss[t] = w[t] (rest_weight sum_i |p_(i) - q_(i)| + pair_weight sum_(v, w) JSD_beta(p_w, q_v)),
    p = exp(teacher_log_scales[t]) softmax(y), q = exp(student_log_scales[t]) softmax(z),
    JSD_beta(p, q) = beta p log(p / m) + (1 - beta) q log(q / m), m = beta p + (1 - beta) q;
    z = cap(logit_scale * logits) / temperature, y likewise; ids of a pair are not in the first sum.

    Args:
        student_logits: [T, >= Vs], any floating dtype; upcast to float64. Differentiable.
        teacher_logits: [T, >= Vt], no gradient.
        temperature: a number or [T]; a pair is (student, teacher).
        token_weights: [T]; 0 makes loss and gradient exactly 0, whatever the row holds.
        student_log_scales: [T], differentiable; teacher_log_scales: [T]. Default: zeros.
        pairs: (student_ids [M], teacher_ids [M]), each id at most once.
        pair_weight, rest_weight, beta: numbers.
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: of z and y.
        student_vocab_size, teacher_vocab_size: Vs and Vt. Default: every column.

    Returns:
        [T] float64.

    Source: ULD, arXiv:2402.12030, equation 5; GOLD's hybrid of it, in TRL.
    """
    student_t, teacher_t = temperature if isinstance(temperature, tuple) else (temperature,) * 2
    weights = torch.ones(len(student_logits), dtype=torch.float64, device=student_logits.device)
    if token_weights is not None:
        weights = token_weights.detach().to(torch.float64)
    skipped = weights == 0
    q = _law(student_logits, skipped, student_vocab_size, student_softcap, student_logit_scale)
    q = _scaled(q, student_t, student_log_scales, skipped)
    p = _law(
        teacher_logits.detach(), skipped, teacher_vocab_size, teacher_softcap, teacher_logit_scale
    )
    p = _scaled(p, teacher_t, teacher_log_scales, skipped).detach()
    value = torch.zeros_like(weights)
    rest_q, rest_p = (torch.ones(x.shape[1], dtype=torch.bool, device=x.device) for x in (q, p))
    if pairs is not None:
        student_ids, teacher_ids = (ids.to(torch.int64) for ids in pairs)
        rest_q[student_ids], rest_p[teacher_ids] = False, False
        value = value + pair_weight * _jsd(p[:, teacher_ids], q[:, student_ids], beta)
    if rest_weight != 0:
        value = value + rest_weight * _sorted_distance(p[:, rest_p], q[:, rest_q])
    return torch.where(skipped, torch.zeros_like(value), weights * value)


def _law(
    logits: Tensor,
    skipped: Tensor,
    vocab_size: int | None,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Logits as the law takes them, before the temperature; of rows that do not count, zeros."""
    scaled = logits[:, :vocab_size].to(torch.float64).masked_fill(skipped.unsqueeze(1), 0.0)
    scaled = logit_scale * scaled
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def _scaled(
    scaled: Tensor, temperature: float | Tensor, log_scales: Tensor | None, skipped: Tensor
) -> Tensor:
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(torch.float64).masked_fill(skipped, 1.0).unsqueeze(1)
    law = torch.softmax(scaled / temperature, dim=1)
    if log_scales is None:
        return law
    return law * log_scales.to(torch.float64).masked_fill(skipped, 0.0).exp().unsqueeze(1)


def _sorted_distance(p: Tensor, q: Tensor) -> Tensor:
    width = max(p.shape[1], q.shape[1])
    p, q = (
        torch.nn.functional.pad(
            x.sort(dim=1, descending=True, stable=True).values, (0, width - x.shape[1])
        )
        for x in (p, q)
    )
    return (p - q).abs().sum(1)


def _jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    # 0 log 0 = 0, with gradient 0
    terms = beta * torch.xlogy(p, p / m.clamp_min(1e-300))
    safe = torch.where(q > 0, q, 1.0)
    return (terms + (1 - beta) * q * torch.log(safe / torch.where(q > 0, m, 1.0))).sum(1)
