# SPDX-License-Identifier: Apache-2.0
"""The mirror of csrc/include/opd/divergences.h in Triton: same ids, names, order and guards.

A divergence is two scalars of one vocabulary entry, `term` and `dterm = d term / d log q`. An entry
is (p, q, gap): teacher, student, and log q - log p formed from the logits themselves. Parameters
travel as three floats: weight = param0 (beta or alpha), rest = 1 - param0, live = 1 - param1; for
skew_forward_kl, which has no param1, the kernels set live to the form of dterm that suits the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import bregman, exp_pair_nonpositive, log_mix

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
def _ratio(gap):
    """(e^-|gap|, e^-|gap| - 1); NaN if p = q = 0, where callers look at the larger first."""
    return exp_pair_nonpositive(tl.where(gap <= 0.0, gap, -gap))


@triton.jit
def _student_minus_teacher(p, q, gap):
    """q - p, with the relative accuracy of gap."""
    larger = tl.where(gap <= 0.0, p, q)
    _, excess = _ratio(gap)
    excess = larger * excess
    return tl.where(larger == 0.0, 0.0, tl.where(gap <= 0.0, excess, -excess))


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
    """m = teacher_weight p + student_weight q: (m, lm - lp, lm - lq, p / m, (q - p) / m).

    Ratios and logarithms are relative to the larger of p and q, so that they stay exact as p -> q,
    when one of them is 0, and when both are too small to divide by.
    """
    teacher_larger = gap <= 0.0
    ratio, excess = _ratio(gap)
    keep = tl.where(teacher_larger, teacher_weight, student_weight)
    weight = tl.where(teacher_larger, student_weight, teacher_weight)
    m_over_larger = keep + weight * ratio
    from_larger = log_mix(ratio, excess, keep, weight)
    from_smaller = from_larger + tl.where(teacher_larger, -gap, gap)
    m = teacher_weight * p + student_weight * q
    lm_lp = tl.where(teacher_larger, from_larger, from_smaller)
    lm_lq = tl.where(teacher_larger, from_smaller, from_larger)
    p_over_m = tl.where(teacher_larger, 1.0, ratio) / m_over_larger
    difference_over_m = tl.where(teacher_larger, excess, -excess) / m_over_larger
    return m, lm_lp, lm_lq, p_over_m, difference_over_m


@triton.jit
def jsd_term(p, q, gap, weight, rest, live):
    m, lm_lp, lm_lq, _, _ = _mixture(p, q, gap, weight, rest)
    return weight * bregman(p, m, lm_lp) + rest * bregman(q, m, lm_lq)


@triton.jit
def jsd_dterm(p, q, gap, weight, rest, live):
    _, _, lm_lq, _, _ = _mixture(p, q, gap, weight, rest)
    return tl.where(q == 0.0, 0.0, -rest * q * lm_lq)


@triton.jit
def skew_forward_kl_term(p, q, gap, weight, rest, live):
    m, lm_lp, _, _, _ = _mixture(p, q, gap, weight, rest)
    return bregman(p, m, lm_lp)


@triton.jit
def skew_forward_kl_dterm(p, q, gap, weight, rest, textbook):
    """rest q (1 - p/m), or the textbook's -rest q p/m where textbook is 1; see divergences.h."""
    _, _, _, p_over_m, difference_over_m = _mixture(p, q, gap, weight, rest)
    factor = (1.0 - textbook) * (rest * difference_over_m) - textbook * p_over_m
    return tl.where(q == 0.0, 0.0, rest * q * factor)


@triton.jit
def skew_forward_kl_overlap(p, q, gap, weight, rest):
    """The summand of sum q p/m, by which a row chooses its form of dterm."""
    _, _, _, p_over_m, _ = _mixture(p, q, gap, weight, rest)
    return tl.where(q == 0.0, 0.0, q * p_over_m)


@triton.jit
def skew_reverse_kl_term(p, q, gap, weight, rest, live):
    m, _, lm_lq, _, _ = _mixture(p, q, gap, rest, weight)
    return bregman(q, m, lm_lq)


@triton.jit
def skew_reverse_kl_dterm(p, q, gap, weight, rest, live):
    _, _, lm_lq, _, difference_over_m = _mixture(p, q, gap, rest, weight)
    through_mixture = live * weight * (-rest * difference_over_m)
    return tl.where(q == 0.0, 0.0, q * (through_mixture - lm_lq))


@triton.jit
def total_variation_term(p, q, gap, weight, rest, live):
    return 0.5 * tl.abs(_student_minus_teacher(p, q, gap))


@triton.jit
def total_variation_dterm(p, q, gap, weight, rest, live):
    # gap itself where it is 0 or NaN
    sign = tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, gap))
    return tl.where(tl.where(gap <= 0.0, p, q) == 0.0, 0.0, q * sign)


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
