# SPDX-License-Identifier: Apache-2.0
"""The mirror of csrc/include/opd/divergences.h in Triton: same ids, names, order and guards.

A divergence is two scalars of one vocabulary entry, `term` and `dterm = d term / d log q`. An entry
is (p, q, gap): teacher, student, and log q - log p formed from the logits themselves. Parameters
travel as three floats: weight = param0 (beta or alpha), rest = 1 - param0, live = 1 - param1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import bregman, expm1_nonpositive, log_mix

# id -> name, the order of OPD_DIVERGENCES
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)


def parameters(param0: float, param1: float) -> tuple[float, float, float]:
    """(weight, rest, live); rest is formed in double, before both are rounded to float32."""
    return param0, 1.0 - param0, 1.0 - param1


@triton.jit
def _larger(p, q, gap):
    return tl.where(gap <= 0.0, p, q)


@triton.jit
def _negative_gap(gap):
    """-|gap|; NaN if p = q = 0, where callers look at _larger first."""
    return tl.where(gap <= 0.0, gap, -gap)


@triton.jit
def _student_minus_teacher(p, q, gap):
    """q - p, with the relative accuracy of gap."""
    larger = _larger(p, q, gap)
    difference = larger * expm1_nonpositive(_negative_gap(gap))
    return tl.where(larger == 0.0, 0.0, tl.where(gap <= 0.0, difference, -difference))


@triton.jit
def forward_kl_term(p, q, gap, weight, rest, live):
    return bregman(p, q, gap)


@triton.jit
def forward_kl_dterm(p, q, gap, weight, rest, live):
    return _student_minus_teacher(p, q, gap)


@triton.jit
def reverse_kl_term(p, q, gap, weight, rest, live):
    return bregman(q, p, -gap)


@triton.jit
def reverse_kl_dterm(p, q, gap, weight, rest, live):
    return tl.where(q == 0.0, 0.0, q * gap)


@triton.jit
def _mixture(p, q, gap, teacher_weight, student_weight):
    """m = teacher_weight p + student_weight q as (m, log m - lp, log m - lq)."""
    teacher_larger = gap <= 0.0
    negative_gap = _negative_gap(gap)
    keep = tl.where(teacher_larger, teacher_weight, student_weight)
    weight = tl.where(teacher_larger, student_weight, teacher_weight)
    from_larger = log_mix(expm1_nonpositive(negative_gap), keep, weight)
    from_smaller = from_larger - negative_gap
    m = teacher_weight * p + student_weight * q
    lm_lp = tl.where(teacher_larger, from_larger, from_smaller)
    lm_lq = tl.where(teacher_larger, from_smaller, from_larger)
    return m, lm_lp, lm_lq


@triton.jit
def jsd_term(p, q, gap, weight, rest, live):
    m, lm_lp, lm_lq = _mixture(p, q, gap, weight, rest)
    return weight * bregman(p, m, lm_lp) + rest * bregman(q, m, lm_lq)


@triton.jit
def jsd_dterm(p, q, gap, weight, rest, live):
    _, _, lm_lq = _mixture(p, q, gap, weight, rest)
    return tl.where(q == 0.0, 0.0, -rest * q * lm_lq)


@triton.jit
def skew_forward_kl_term(p, q, gap, weight, rest, live):
    m, lm_lp, _ = _mixture(p, q, gap, weight, rest)
    return bregman(p, m, lm_lp)


@triton.jit
def skew_forward_kl_dterm(p, q, gap, weight, rest, live):
    m = weight * p + rest * q
    # 1 - p/m = rest (q - p) / m, where q - p does not cancel
    difference = _student_minus_teacher(p, q, gap)
    return tl.where(q == 0.0, 0.0, rest * q * (rest * difference / m))


@triton.jit
def skew_reverse_kl_term(p, q, gap, weight, rest, live):
    m, _, lm_lq = _mixture(p, q, gap, rest, weight)
    return bregman(q, m, lm_lq)


@triton.jit
def skew_reverse_kl_dterm(p, q, gap, weight, rest, live):
    m, _, lm_lq = _mixture(p, q, gap, rest, weight)
    through_mixture = live * weight * (-rest * _student_minus_teacher(p, q, gap) / m)
    return tl.where(q == 0.0, 0.0, q * (through_mixture - lm_lq))


@triton.jit
def total_variation_term(p, q, gap, weight, rest, live):
    return 0.5 * tl.abs(_student_minus_teacher(p, q, gap))


@triton.jit
def total_variation_dterm(p, q, gap, weight, rest, live):
    sign = tl.where(gap > 0.0, 0.5, -0.5)
    return q * tl.where(gap == 0.0, 0.0, sign)


@triton.jit
def divergence_term(p, q, gap, weight, rest, live, DIVERGENCE: tl.constexpr):
    """term of the divergence with this id."""
    tl.static_assert(DIVERGENCE >= 0 and DIVERGENCE <= 5)
    if DIVERGENCE == 0:
        return forward_kl_term(p, q, gap, weight, rest, live)
    elif DIVERGENCE == 1:
        return reverse_kl_term(p, q, gap, weight, rest, live)
    elif DIVERGENCE == 2:
        return jsd_term(p, q, gap, weight, rest, live)
    elif DIVERGENCE == 3:
        return skew_forward_kl_term(p, q, gap, weight, rest, live)
    elif DIVERGENCE == 4:
        return skew_reverse_kl_term(p, q, gap, weight, rest, live)
    else:
        return total_variation_term(p, q, gap, weight, rest, live)


@triton.jit
def divergence_dterm(p, q, gap, weight, rest, live, DIVERGENCE: tl.constexpr):
    """dterm of the divergence with this id."""
    if DIVERGENCE == 0:
        return forward_kl_dterm(p, q, gap, weight, rest, live)
    elif DIVERGENCE == 1:
        return reverse_kl_dterm(p, q, gap, weight, rest, live)
    elif DIVERGENCE == 2:
        return jsd_dterm(p, q, gap, weight, rest, live)
    elif DIVERGENCE == 3:
        return skew_forward_kl_dterm(p, q, gap, weight, rest, live)
    elif DIVERGENCE == 4:
        return skew_reverse_kl_dterm(p, q, gap, weight, rest, live)
    else:
        return total_variation_dterm(p, q, gap, weight, rest, live)
