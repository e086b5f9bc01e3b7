# SPDX-License-Identifier: Apache-2.0
"""A divergence from a teacher of whom K entries are known, in float64, [T, V] formed whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .divergence import entropy
from .divergences import evaluate, name_and_params

_NO_SUM_OVER_ENTRIES = ("renyi", "adaptive_kl", "concrete_score")


def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tail_logprob: Tensor | None = None,
    divergence: object = "forward_kl",
    support: str = "teacher",
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence of a teacher given on the ids S of a token, and the student's law q.

    loss[t] = token_weights[t] * sum_j c_j[t] * D_j(p', q'), with S the distinct ids and
    tail "bucket": p' = (p_v for v in S, 1 - p(S)), q' = (q_v for v in S, 1 - q(S));
    "renormalize_both": p' = p / p(S) and q' = q / q(S) on S;
    "renormalize_teacher": p' = (p_v / p(S) for v in S, 0), q' as in the bucket;
    "drop": the summands of D_j at v in S, with p and q as they are.

    Args:
        student_logits: [T, >= V], any floating dtype; upcast to float64. Differentiable.
        teacher_ids: [T, K]; negative = none; of an id named twice the first counts.
        teacher_logprobs: [T, K], log p; no gradient.
        tail_logprob: [T], log(1 - p(S)); default: computed from teacher_logprobs, and log of their
            dtype's eps where they sum to 1.
        divergence: as `reference.divergence` takes it, without cross_entropy.
        support: whose ids they are; says nothing about the value.
        tail: see above.
        temperature: of the student's logits; a number or [T].
        softcap, logit_scale: of the student's logits.
        token_weights: [T]; 0 makes loss and gradient exactly 0.
        vocab_size: V. Default: every column.

    Returns:
        [T] float64, nats. Not reduced.

    Source: the definitions of `opd_kernels.reference.divergences` on the cells of a partition.
    """
    del support
    ids, log_p, skipped = _teacher(teacher_ids, teacher_logprobs, token_weights)
    law = _student_law(student_logits, skipped, temperature, softcap, logit_scale, vocab_size)
    unit = torch.finfo(teacher_logprobs.dtype).eps
    p_cells, q_cells = _cells(ids, log_p, tail_logprob, law, tail, skipped, unit)
    weights = torch.ones_like(log_p[:, 0]) if token_weights is None else token_weights.double()
    total = torch.zeros_like(weights)
    pairs = divergence if isinstance(divergence, (tuple, list)) else ((1.0, divergence),)
    for coefficient, component in pairs:
        factor = weights * coefficient
        off = skipped | (factor == 0)
        value = _value(component, p_cells, q_cells, tail)
        total = total + torch.where(off, 0.0, factor * torch.where(off, 0.0, value))
    return total


def topk_divergence_statistics(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tail_logprob: Tensor | None = None,
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Every named statistic of the fused op, [T] float64; 0 where the weight is 0.

    student_mass = q(S), teacher_mass = p(S); student_entropy and student_lse of the whole law;
    forward_kl and reverse_kl of the cells that `tail` makes.
    """
    with torch.no_grad():
        ids, log_p, skipped = _teacher(teacher_ids, teacher_logprobs, token_weights)
        scaled = _scaled(student_logits, skipped, temperature, softcap, logit_scale, vocab_size)
        law = torch.log_softmax(scaled, -1)
        unit = torch.finfo(teacher_logprobs.dtype).eps
        p_cells, q_cells = _cells(ids, log_p, tail_logprob, law, tail, skipped, unit)
        named = {
            "student_mass": law.exp().masked_fill(~_membership(ids, law), 0.0).sum(-1),
            "teacher_mass": log_p.exp().sum(-1),
            "student_entropy": entropy(law),
            "student_lse": scaled.logsumexp(-1),
            "forward_kl": _value("forward_kl", p_cells, q_cells, tail),
            "reverse_kl": _value("reverse_kl", p_cells, q_cells, tail),
        }
        return {name: value.masked_fill(skipped, 0.0) for name, value in named.items()}


def _teacher(
    teacher_ids: Tensor, teacher_logprobs: Tensor, token_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids with -1 for what does not count, log p with -inf there, rows of weight 0)."""
    ids = teacher_ids.to(torch.int64).clone()
    skipped = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    if token_weights is not None:
        skipped = token_weights == 0
    ids[skipped] = -1
    for column in range(1, ids.shape[1]):
        seen = (ids[:, :column] == ids[:, column : column + 1]).any(1)
        ids[:, column] = torch.where(seen, -1, ids[:, column])
    log_p = teacher_logprobs.detach().to(torch.float64).masked_fill(ids < 0, -math.inf)
    return ids, log_p, skipped


def _scaled(
    logits: Tensor,
    skipped: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    vocab_size: int | None,
) -> Tensor:
    scaled = logit_scale * logits[..., :vocab_size].to(torch.float64)
    scaled = torch.where(skipped.unsqueeze(-1), 0.0, scaled)
    if softcap is not None:
        scaled = softcap * torch.tanh(scaled / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(torch.float64).masked_fill(skipped, 1.0).unsqueeze(-1)
    return scaled / temperature


def _student_law(*arguments) -> Tensor:
    return torch.log_softmax(_scaled(*arguments), dim=-1)


def _membership(ids: Tensor, law: Tensor) -> Tensor:
    """[T, V]: which entries are in S."""
    inside = torch.zeros(law.shape[0], law.shape[1] + 1, dtype=torch.bool, device=law.device)
    # what counts for nothing goes into a column of its own
    places = torch.where(ids < 0, law.shape[1], ids)
    return inside.scatter(1, places, True)[:, :-1]


def _cells(
    ids: Tensor,
    log_p: Tensor,
    tail_logprob: Tensor | None,
    law: Tensor,
    tail: str,
    skipped: Tensor,
    unit: float,
) -> tuple[Tensor, Tensor]:
    """(log p', log q'); rows that are skipped are anything finite. unit: eps of the given log p."""
    log_q = law.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -math.inf)
    if tail == "renormalize_both":
        log_p = log_p.masked_fill(skipped.unsqueeze(1), 0.0)
        log_q = log_q.masked_fill(skipped.unsqueeze(1), 0.0)
        return torch.log_softmax(log_p, -1), torch.log_softmax(log_q, -1)
    if tail == "drop":
        return log_p, log_q
    inside = _membership(ids, law)
    # -inf inside, so that its gradient is that of a constant
    log_q_rest = law.masked_fill(inside, -math.inf).logsumexp(-1)
    everywhere = inside.all(-1)
    log_q_rest = torch.where(everywhere, -math.inf, log_q_rest)
    if tail == "renormalize_teacher":
        log_p_rest = torch.full_like(log_q_rest, -math.inf)
    elif tail_logprob is not None:
        log_p_rest = tail_logprob.detach().to(torch.float64)
    else:
        rest = -torch.expm1(log_p.logsumexp(-1))
        # a sum of 1 is rounding: what is left is less than the given numbers can say
        log_p_rest = torch.where(rest > 0, rest, unit).log()
        log_p_rest = torch.where(everywhere, -math.inf, log_p_rest)
    log_p_rest = log_p_rest.masked_fill(skipped, 0.0)
    p_cells = torch.log_softmax(torch.cat([log_p, log_p_rest.unsqueeze(-1)], -1), -1)
    return p_cells, torch.cat([log_q, log_q_rest.unsqueeze(-1)], -1)


def _value(component: object, p_cells: Tensor, q_cells: Tensor, tail: str) -> Tensor:
    name, params = name_and_params(component)
    if name == "cross_entropy":
        raise ValueError("reference.topk_divergence: cross_entropy has labels, not a teacher.")
    if tail != "drop":
        return evaluate(component, p_cells, q_cells)
    if name in _NO_SUM_OVER_ENTRIES:
        raise ValueError(f"reference.topk_divergence: {name} is no sum over entries to drop from.")
    value = evaluate(component, p_cells, q_cells)
    if name == "alpha":
        # its "- 1" is the teacher's mass, of which only some is here
        order = params.get("alpha", 0.5)
        value = value + (1.0 - p_cells.exp().sum(-1)) / (order * (order - 1.0))
    return value
