# SPDX-License-Identifier: Apache-2.0
"""What sorted_l1 and its fused twin share: two laws, their pairs, and how a GPU compares them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws
from ._row_chunks import Scratch, law_logits
from .token_logprobs import Law, pack_law

# of a row on a GPU: laws, what is sorted with its ids, and gradients, all of them alive at one time
_STUDENT_BYTES, _TEACHER_BYTES = 64, 40


class Ranks(NamedTuple):
    """The arguments of OPD_RANKS in csrc/torch/ops.cpp."""

    student_bias: Tensor | None
    student_temperatures: Tensor | None
    student_numbers: list[float]
    student_vocab_size: int
    teacher_bias: Tensor | None
    teacher_temperatures: Tensor | None
    teacher_numbers: list[float]
    teacher_vocab_size: int
    student_log_scales: Tensor | None
    teacher_log_scales: Tensor | None
    student_pairs: Tensor | None
    teacher_paired: Tensor | None
    token_weights: Tensor | None
    # of the ranks, of the pairs; the JSD's beta
    weights: list[float]

    @property
    def student(self) -> Law:
        return Law(*self[:4])

    @property
    def teacher(self) -> Law:
        return Law(*self[4:8])

    def rows(self, rows: slice | Tensor, weights: Tensor | None) -> Ranks:
        """Of some of the rows, with their weights."""

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return self._replace(
            student_temperatures=take(self.student_temperatures),
            teacher_temperatures=take(self.teacher_temperatures),
            student_log_scales=take(self.student_log_scales),
            teacher_log_scales=take(self.teacher_log_scales),
            token_weights=weights,
        )


NUM_ARGUMENTS = len(Ranks._fields)
LOG_SCALES = Ranks._fields.index("student_log_scales")


def pack(
    rows: _laws.Rows,
    vocab_sizes: tuple[int, int],
    *,
    temperature: _laws.Temperature,
    token_weights: Tensor | None,
    log_scales: tuple[Tensor | None, Tensor | None],
    pairs: tuple[Tensor, Tensor] | None,
    pair_weight: float,
    rest_weight: float,
    beta: float,
    biases: tuple[Tensor | None, Tensor | None],
    softcaps: tuple[float | None, float | None],
    logit_scales: tuple[float, float],
) -> Ranks:
    """Checks the keyword arguments of a call and packs them; pairs of student and teacher."""
    op = rows.op
    temperatures = _checks.temperatures(op, temperature)
    laws = [
        pack_law(rows, size, temperature=value, softcap=cap, logit_scale=scale, bias=bias)
        for size, value, cap, scale, bias in zip(
            vocab_sizes, temperatures, softcaps, logit_scales, biases, strict=True
        )
    ]
    student_scales, teacher_scales = log_scales
    if student_scales is not None:
        # its check is that of a constant, and this one may have a gradient
        _checks.per_token(rows, "student_log_scales", student_scales.detach())
        student_scales = student_scales.to(rows.real).contiguous()
    if teacher_scales is not None:
        teacher_scales = _checks.per_token(rows, "teacher_log_scales", teacher_scales)
    weights = [
        _weight(op, "rest_weight", rest_weight),
        _weight(op, "pair_weight", pair_weight),
        _checks.temperature(op, "beta", beta),
    ]
    if not beta < 1:
        raise ValueError(
            f"{op}: beta must be in (0, 1), got {beta}. The JSD tends to 0 at both ends."
        )
    return Ranks(
        *laws[0],
        *laws[1]._replace(bias=None if laws[1].bias is None else laws[1].bias.detach()),
        student_scales,
        teacher_scales,
        *_tables(rows, vocab_sizes, pairs),
        _checks.token_weights(op, token_weights, rows.num_tokens, rows.device, rows.real),
        weights,
    )


def _weight(op: str, name: str, value: float) -> float:
    if value == 0:
        return 0.0
    value = _checks.logit_scale(op, name, value)
    if value < 0:
        raise ValueError(f"{op}: {name} must be at least 0, got {value}.")
    return value


def _tables(
    rows: _laws.Rows, vocab_sizes: tuple[int, int], pairs: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    """(the teacher's id of each of the student's, -1 for none; which of the teacher's are taken)"""
    if pairs is None:
        return None, None
    if not isinstance(pairs, (tuple, list)) or len(pairs) != 2:
        raise TypeError(
            f"{rows.op}: pairs must be (student_ids, teacher_ids), got {type(pairs).__name__}."
        )
    checked = []
    for side, ids, size in zip(("student", "teacher"), pairs, vocab_sizes, strict=True):
        name = f"{side}_ids of pairs"
        _checks.tensor(rows.op, name, ids, 1)
        _checks.length(rows.op, name, ids, len(pairs[0]), "student_ids")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{rows.op}: {name} must be int64 or int32, got {ids.dtype}.")
        if ids.device != rows.device:
            raise ValueError(f"{rows.op}: {name} must be on {rows.device}, got {ids.device}.")
        checked.append(ids.to(torch.int64))
        _checks.distinct_ids(rows.op, checked[-1], size, name)
    student_ids, teacher_ids = checked
    student_size, teacher_size = vocab_sizes
    partner = torch.full((student_size,), -1, dtype=torch.int64, device=rows.device)
    is_taken = torch.zeros(teacher_size, dtype=torch.uint8, device=rows.device)
    return partner.index_copy(0, student_ids, teacher_ids), is_taken.index_fill(0, teacher_ids, 1)


def check_values(op: str, ranks: Ranks) -> None:
    """What is read of numbers of rows, on a CPU. For the body of an op."""
    largest = torch.finfo(torch.float32)
    for name, values, bounds in (
        ("student temperature", ranks.student_temperatures, _positive(largest)),
        ("teacher temperature", ranks.teacher_temperatures, _positive(largest)),
        ("student_log_scales", ranks.student_log_scales, _LOGS),
        ("teacher_log_scales", ranks.teacher_log_scales, _LOGS),
    ):
        if values is not None:
            _checks.values_in_range(op, name, values, ranks.token_weights, *bounds)


# log-probabilities, whose rounding may be above 0
_LOGS = (-math.inf, 1e-3, "log-probabilities, at most 0")


def _positive(info: torch.finfo) -> tuple[float, float, str]:
    return info.tiny, info.max, "positive and finite"


def scratch(like: Tensor, student_size: int, teacher_size: int) -> Scratch:
    """What a comparison of rows of these logits or hidden states allocates."""
    if like.device.type != "cpu":
        width = _checks.real_dtype(like).itemsize // 4
        return Scratch(
            per_row=width * (_STUDENT_BYTES * student_size + _TEACHER_BYTES * teacher_size)
        )
    # of csrc/core/sorted_l1.cpp, for each thread: keys twice, with and without ids, and a row each
    key, entry = (4, 8) if _checks.real_dtype(like) == torch.float32 else (8, 16)
    of_thread = (2 * entry + key) * student_size + 3 * key * teacher_size
    return Scratch(per_call=_dispatch.num_threads() * (of_thread + 64))


def compare(
    student_logits: Tensor, teacher_logits: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [T], dloss / d student_logits, dloss / d student_log_scales) in torch operations.

    What csrc/core/sorted_l1.cpp computes, for devices whose library sorts.
    """
    rest_weight, pair_weight, beta = ranks.weights
    real = _checks.real_dtype(student_logits)
    raw = student_logits[:, : ranks.student_vocab_size].to(real)
    z = law_logits(raw, ranks.student)
    log_q = z.log_softmax(1)
    del z
    q = log_q.exp()
    teacher = teacher_logits[:, : ranks.teacher_vocab_size].to(real)
    log_p = law_logits(teacher, ranks.teacher).log_softmax(1)
    p = log_p.exp()
    student_scale = _column(ranks.student_log_scales, q)
    teacher_scale = _column(ranks.teacher_log_scales, q)
    summands, loss = _ranked(q, p, student_scale.exp(), teacher_scale.exp(), ranks)
    summands, loss = rest_weight * summands, rest_weight * loss
    if ranks.student_pairs is not None and pair_weight != 0.0:
        of_pairs, terms = _paired(
            log_q + student_scale, log_p + teacher_scale, ranks.student_pairs, beta
        )
        summands += pair_weight * of_pairs
        loss = loss + pair_weight * terms
    total = summands.sum(1)
    grad = summands.sub_(q * total.unsqueeze(1)) * _slope(raw, ranks.student)
    if ranks.token_weights is not None:
        weights = ranks.token_weights
        is_dead = weights == 0
        loss = (loss * weights).masked_fill(is_dead, 0.0)
        total = (total * weights).masked_fill(is_dead, 0.0)
        grad = grad.mul_(weights.unsqueeze(1)).masked_fill_(is_dead.unsqueeze(1), 0.0)
    return loss, grad, total


def _column(values: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(1, 1) if values is None else values.detach().unsqueeze(1)


def _ranked(
    q: Tensor, p: Tensor, student_scale: Tensor, teacher_scale: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """(u [T, Vs], sum_i |p_(i) - q_(i)|) of what has no partner."""
    if ranks.student_pairs is not None:
        q = q.masked_fill(ranks.student_pairs >= 0, 0.0)
        p = p.masked_fill(ranks.teacher_paired != 0, 0.0)
    ordered_q, ids = q.sort(dim=1, descending=True, stable=True)
    ordered_p = p.sort(dim=1, descending=True).values
    ordered_q, ordered_p = student_scale * ordered_q, teacher_scale * ordered_p
    both = min(q.shape[1], p.shape[1])
    excess = ordered_q.clone()
    excess[:, :both] -= ordered_p[:, :both]
    loss = excess.abs().sum(1) + ordered_p[:, both:].sum(1)
    return torch.empty_like(q).scatter_(1, ids, ordered_q * excess.sign()), loss


def _paired(
    log_q: Tensor, log_p: Tensor, student_pairs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """(u [T, Vs], sum JSD_beta(p_w, q_v)) over the pairs (v, w).

    Relative to the larger of p and q, L: with g = -|log q - log p| and w the smaller one's weight,
    log(m / L) = log1p(w expm1(g)), which is exact where p and q are close.
    """
    is_paired = student_pairs >= 0
    log_p = log_p[:, student_pairs.clamp_min(0)]
    gap = log_q - log_p
    # neither side has it
    is_absent = ~is_paired | ((log_q == -math.inf) & (log_p == -math.inf))
    gap = gap.masked_fill(is_absent, 0.0)
    student_larger = gap > 0
    size = -gap.abs()
    # not torch.where of two numbers, which is float32
    smaller = torch.full_like(gap, 1.0 - beta).masked_fill_(student_larger, beta)
    log_m = torch.log1p(smaller * torch.expm1(size))
    ratio, larger = size.exp(), torch.maximum(log_q, log_p).exp()
    below = torch.where(ratio > 0, ratio * (size - log_m), 0.0)
    term = larger * (smaller * below - (1.0 - smaller) * log_m)
    from_q = torch.where(student_larger, -log_m, below)
    dterm = (1.0 - beta) * larger * from_q
    zero = torch.zeros((), dtype=term.dtype, device=term.device)
    return torch.where(is_absent, zero, dterm), torch.where(is_absent, zero, term).sum(1)


def _slope(raw: Tensor, law: Law) -> Tensor:
    """d law_logits / d logits, [T, V] or broadcast to it."""
    scale, cap, temperature = law.numbers
    if law.temperatures is not None:
        factor = scale / law.temperatures.unsqueeze(1)
    else:
        factor = raw.new_full((1, 1), scale / temperature)
    if cap == 0.0:
        return factor
    inner = law_logits(raw, law._replace(temperatures=None, numbers=[scale, 0.0, 1.0]))
    return factor * (1.0 - torch.tanh(inner / cap).square())
