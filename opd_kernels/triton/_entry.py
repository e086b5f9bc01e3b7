# SPDX-License-Identifier: Apache-2.0
"""One vocabulary entry, as Entry and Mixture of csrc/include/opd/divergences.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._math import exp_pair_nonpositive, log_mix


class Entry(NamedTuple):
    """Log-probabilities and probabilities of teacher (p) and student (q); gap = log q - log p.

    The gap is formed from the logits themselves: the difference of two rounded log-probabilities
    would have lost the digits that matter once the student is near the teacher.
    """

    lp: Any
    lq: Any
    p: Any
    q: Any
    gap: Any
    lp_low: Any
    lq_low: Any


class Mixture(NamedTuple):
    """m, log m - log p, log m - log q, p / m, q / m, (q - p) / m."""

    m: Any
    lm_lp: Any
    lm_lq: Any
    p_over_m: Any
    q_over_m: Any
    difference_over_m: Any


@triton.jit
def larger(e):
    return tl.where(e.gap <= 0.0, e.p, e.q)


@triton.jit
def ratio(e):
    """(e^-|gap|, e^-|gap| - 1); NaN if p = q = 0, where callers look at larger() first."""
    return exp_pair_nonpositive(tl.where(e.gap <= 0.0, e.gap, -e.gap))


@triton.jit
def student_minus_teacher(e):
    """q - p, with the relative accuracy of gap."""
    _, excess = ratio(e)
    most = larger(e)
    excess = most * excess
    return tl.where(most == 0.0, 0.0, tl.where(e.gap <= 0.0, excess, -excess))


@triton.jit
def absent(e):
    """-inf logits on both sides, as in the padding of a block: counts for nothing."""
    return (e.lp == float("-inf")) & (e.lq == float("-inf"))


@triton.jit
def swapped(e):
    return Entry(e.lq, e.lp, e.q, e.p, -e.gap, e.lq_low, e.lp_low)


@triton.jit
def mixture(e, teacher_weight, student_weight):
    """m = teacher_weight p + student_weight q.

    Ratios and logarithms are relative to the larger of p and q, so that they stay exact as p -> q,
    when one of them is 0, and when both are too small to divide by.
    """
    teacher_larger = e.gap <= 0.0
    decay, excess = ratio(e)
    keep = tl.where(teacher_larger, teacher_weight, student_weight)
    weight = tl.where(teacher_larger, student_weight, teacher_weight)
    m_over_larger = keep + weight * decay
    from_larger = log_mix(decay, excess, keep, weight)
    from_smaller = from_larger + tl.where(teacher_larger, -e.gap, e.gap)
    larger_over_m = 1.0 / m_over_larger
    smaller_over_m = decay * larger_over_m
    return Mixture(
        teacher_weight * e.p + student_weight * e.q,
        tl.where(teacher_larger, from_larger, from_smaller),
        tl.where(teacher_larger, from_smaller, from_larger),
        tl.where(teacher_larger, larger_over_m, smaller_over_m),
        tl.where(teacher_larger, smaller_over_m, larger_over_m),
        tl.where(teacher_larger, excess, -excess) * larger_over_m,
    )
