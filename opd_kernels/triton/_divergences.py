# SPDX-License-Identifier: Apache-2.0
"""The mirror of csrc/include/opd/divergences.h in Triton: same ids, names, order and guards.

A divergence is two scalars of one vocabulary entry e, `term` and `dterm = d term / d log q`; and
`dterm_teacher = d term / d log p`, for targets that contain the student. c are its constants
and r what sums over the row make of the row; _divergence_rows.py forms both and has the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._entry import absent, larger, mixture, ratio, student_minus_teacher
from ._math import bregman, zero_times
from ._powers import (
    alpha_beta_form,
    alpha_beta_sum,
    geometric,
    power_dterm,
    power_term,
    renyi_form,
)

# id -> name, the order of OPD_DIVERGENCES
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "jeffreys",
    "squared_hellinger",
    "alpha",
    "renyi",
    "pearson_chi2",
    "neyman_chi2",
    "todi",
    "adaptive_kl",
    "alpha_beta",
    "concrete_score",
)


@triton.jit
def forward_kl_term(e, c, r):
    return bregman(e.p, e.q, e.gap)


@triton.jit
def forward_kl_dterm(e, c, r):
    return student_minus_teacher(e)


@triton.jit
def reverse_kl_term(e, c, r):
    return bregman(e.q, e.p, -e.gap)


@triton.jit
def reverse_kl_dterm(e, c, r):
    return tl.where(e.q == 0.0, 0.0, e.q * e.gap)


@triton.jit
def jsd_term(e, c, r):
    mix = mixture(e, c[0], c[1])
    return c[0] * bregman(e.p, mix.m, mix.lm_lp) + c[1] * bregman(e.q, mix.m, mix.lm_lq)


@triton.jit
def jsd_dterm(e, c, r):
    mix = mixture(e, c[0], c[1])
    return tl.where(e.q == 0.0, 0.0, -c[1] * e.q * mix.lm_lq)


@triton.jit
def skew_forward_kl_term(e, c, r):
    mix = mixture(e, c[0], c[1])
    return bregman(e.p, mix.m, mix.lm_lp)


@triton.jit
def skew_forward_kl_dterm(e, c, r):
    """The textbook's form, without + c q, where r says that the laws barely overlap."""
    mix = mixture(e, c[0], c[1])
    # blended: a choice by row doubles the loop around this, and its registers
    textbook = r[0].to(tl.float32)
    factor = (1.0 - textbook) * (c[1] * mix.difference_over_m) - textbook * mix.p_over_m
    return tl.where(e.q == 0.0, 0.0, c[1] * e.q * factor)


@triton.jit
def skew_reverse_kl_term(e, c, r):
    mix = mixture(e, c[1], c[0])
    return bregman(e.q, mix.m, mix.lm_lq)


@triton.jit
def skew_reverse_kl_dterm(e, c, r):
    """c[2] is 1 where gradient flows through the mixture, 0 where it is detached."""
    mix = mixture(e, c[1], c[0])
    through_mixture = c[2] * c[0] * (-c[1] * mix.difference_over_m)
    return tl.where(e.q == 0.0, 0.0, e.q * (through_mixture - mix.lm_lq))


@triton.jit
def total_variation_term(e, c, r):
    return 0.5 * tl.abs(student_minus_teacher(e))


@triton.jit
def total_variation_dterm(e, c, r):
    # gap itself where it is 0 or NaN
    sign = tl.where(e.gap > 0.0, 0.5, tl.where(e.gap < 0.0, -0.5, e.gap))
    return tl.where(larger(e) == 0.0, 0.0, e.q * sign)


@triton.jit
def jeffreys_term(e, c, r):
    # a weight of 0, as adaptive_kl may have, leaves its side out, infinite or not
    forward, reverse = forward_kl_term(e, c, r), reverse_kl_term(e, c, r)
    return zero_times(c[0], forward) + zero_times(c[1], reverse)


@triton.jit
def jeffreys_dterm(e, c, r):
    return c[0] * forward_kl_dterm(e, c, r) + c[1] * reverse_kl_dterm(e, c, r)


@triton.jit
def alpha_term(e, c, r):
    return power_term(e, c[0], c[1], c[7], c[8], c[5], c[6])


@triton.jit
def alpha_dterm(e, c, r):
    """The textbook's form, without + scale q / alpha, where the laws barely overlap."""
    usual = power_dterm(e, c[0], c[1], c[7], c[8], c[2], c[3], c[6])
    textbook = -c[2] * c[3] * geometric(e, c[0], c[1], c[7], c[8], 0.0)
    return tl.where(r[0], textbook, usual)


@triton.jit
def squared_hellinger_term(e, c, r):
    return alpha_term(e, c, r)


@triton.jit
def squared_hellinger_dterm(e, c, r):
    return alpha_dterm(e, c, r)


@triton.jit
def pearson_chi2_term(e, c, r):
    return alpha_term(e, c, r)


@triton.jit
def pearson_chi2_dterm(e, c, r):
    return alpha_dterm(e, c, r)


@triton.jit
def neyman_chi2_term(e, c, r):
    return alpha_term(e, c, r)


@triton.jit
def neyman_chi2_dterm(e, c, r):
    return alpha_dterm(e, c, r)


@triton.jit
def renyi_term(e, c, r):
    """Nothing: the value is one of the row's mass alone."""
    return tl.zeros_like(e.gap)


@triton.jit
def renyi_dterm(e, c, r):
    return renyi_form(e, c[0], c[1], c[7], c[8], r[0])


@triton.jit
def todi_term(e, c, r):
    return tl.where(larger(e) == 0.0, 0.0, student_minus_teacher(e) * e.gap)


@triton.jit
def todi_dterm(e, c, r):
    decay, _ = ratio(e)
    student_share = tl.where(e.gap <= 0.0, decay, 1.0) / (1.0 + decay)
    return student_minus_teacher(e) + tl.where(e.q == 0.0, 0.0, e.q * e.gap * student_share)


@triton.jit
def adaptive_kl_term(e, c, r):
    return jeffreys_term(e, r, r)


@triton.jit
def adaptive_kl_dterm(e, c, r):
    return jeffreys_dterm(e, r, r)


@triton.jit
def alpha_beta_term(e, c, r):
    return alpha_beta_sum(e, c, r[0])


@triton.jit
def alpha_beta_dterm(e, c, r):
    return alpha_beta_form(e, c[0], c[1], c[2], c[13], c[14], c[15], c[10], r[0])


@triton.jit
def law_weight(e, student, teacher, uniform):
    """The weight of concrete_score: student q + teacher p + uniform over what both laws allow."""
    uniform = tl.where(tl.abs(e.gap) == float("inf"), 0.0, uniform)
    return tl.where(absent(e), 0.0, student * e.q + teacher * e.p + uniform)


@triton.jit
def weighted(weight, value):
    """weight * value, where a weight of 0 wins over an infinite gap."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def concrete_score_term(e, c, r):
    x, y = e.gap - r[0], e.gap - r[1]
    first, second = law_weight(e, c[0], c[1], r[2]), law_weight(e, c[3], c[4], r[3])
    return 0.5 * (weighted(first, x * x) + weighted(second, y * y))


@triton.jit
def concrete_score_dterm(e, c, r):
    first, second = law_weight(e, c[0], c[1], r[2]), law_weight(e, c[3], c[4], r[3])
    return weighted(first, e.gap - r[1]) + weighted(second, e.gap - r[0])


@triton.jit
def divergence_term(e, c, r, DIVERGENCE: tl.constexpr):
    """term of the divergence with this id."""
    tl.static_assert(DIVERGENCE >= 0 and DIVERGENCE <= 15)
    if DIVERGENCE == 0:
        return forward_kl_term(e, c, r)
    elif DIVERGENCE == 1:
        return reverse_kl_term(e, c, r)
    elif DIVERGENCE == 2:
        return jsd_term(e, c, r)
    elif DIVERGENCE == 3:
        return skew_forward_kl_term(e, c, r)
    elif DIVERGENCE == 4:
        return skew_reverse_kl_term(e, c, r)
    elif DIVERGENCE == 5:
        return total_variation_term(e, c, r)
    elif DIVERGENCE == 6:
        return jeffreys_term(e, c, r)
    elif DIVERGENCE == 7:
        return squared_hellinger_term(e, c, r)
    elif DIVERGENCE == 8:
        return alpha_term(e, c, r)
    elif DIVERGENCE == 9:
        return renyi_term(e, c, r)
    elif DIVERGENCE == 10:
        return pearson_chi2_term(e, c, r)
    elif DIVERGENCE == 11:
        return neyman_chi2_term(e, c, r)
    elif DIVERGENCE == 12:
        return todi_term(e, c, r)
    elif DIVERGENCE == 13:
        return adaptive_kl_term(e, c, r)
    elif DIVERGENCE == 14:
        return alpha_beta_term(e, c, r)
    else:
        return concrete_score_term(e, c, r)


@triton.jit
def divergence_dterm(e, c, r, DIVERGENCE: tl.constexpr):
    """dterm of the divergence with this id."""
    if DIVERGENCE == 0:
        return forward_kl_dterm(e, c, r)
    elif DIVERGENCE == 1:
        return reverse_kl_dterm(e, c, r)
    elif DIVERGENCE == 2:
        return jsd_dterm(e, c, r)
    elif DIVERGENCE == 3:
        return skew_forward_kl_dterm(e, c, r)
    elif DIVERGENCE == 4:
        return skew_reverse_kl_dterm(e, c, r)
    elif DIVERGENCE == 5:
        return total_variation_dterm(e, c, r)
    elif DIVERGENCE == 6:
        return jeffreys_dterm(e, c, r)
    elif DIVERGENCE == 7:
        return squared_hellinger_dterm(e, c, r)
    elif DIVERGENCE == 8:
        return alpha_dterm(e, c, r)
    elif DIVERGENCE == 9:
        return renyi_dterm(e, c, r)
    elif DIVERGENCE == 10:
        return pearson_chi2_dterm(e, c, r)
    elif DIVERGENCE == 11:
        return neyman_chi2_dterm(e, c, r)
    elif DIVERGENCE == 12:
        return todi_dterm(e, c, r)
    elif DIVERGENCE == 13:
        return adaptive_kl_dterm(e, c, r)
    elif DIVERGENCE == 14:
        return alpha_beta_dterm(e, c, r)
    else:
        return concrete_score_dterm(e, c, r)
