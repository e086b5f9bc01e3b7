# SPDX-License-Identifier: Apache-2.0
"""The rest of divergences.h: constants, sums over the row, dterm_teacher and the value.

Sums over the row and values are float64 scalars; what the terms read of a row is float32.
"""

from __future__ import annotations

import ctypes
import math

import triton
import triton.language as tl

from ._divergences import (
    concrete_score_dterm,
    law_weight,
    todi_dterm,
    total_variation_dterm,
    weighted,
)
from ._entry import mixture, student_minus_teacher, swapped
from ._powers import (
    alpha_beta_form,
    geometric,
    power_dterm,
    power_term,
    renyi_form,
    renyi_log_mass,
)

# id -> sums over the row that term and dterm need first
NUM_ROW_SUMS = (0, 0, 0, 1, 0, 0, 0, 1, 1, 2, 1, 1, 0, 2, 1, 3, 0)
ADAPTIVE_KL = 13
# no divergence of two laws: the kernels add it from the labels
CROSS_ENTROPY = 16


# -- constants -----------------------------------------------------------------------------------


def constants(divergence: int, param0: float, param1: float) -> tuple[float, ...]:
    """c of the divergence with this id: formed in double, float32 in the kernels."""
    match divergence:
        case 2 | 3 | 6:
            return param0, 1.0 - param0
        case 4:
            return param0, 1.0 - param0, 1.0 - param1
        case 7:
            return _power_constants(0.5, 0.25)
        case 8:
            return _power_constants(param0, 1.0)
        case 9:
            alpha, rest, _, _, _, factor, reach, *lows = _power_constants(param0, 1.0)
            product = alpha * (alpha - 1.0)
            return alpha, rest, factor, reach, product, 1.0 / (alpha - 1.0), alpha / rest, *lows
        case 10:
            return _power_constants(2.0, 2.0)
        case 11:
            return _power_constants(-1.0, 2.0)
        case 13:
            # both halves of a double: tokens whose mass is exactly head_mass are in the head
            return param0, _low(param0)
        case 14:
            return _alpha_beta_constants(param0, param1)
        case 15:
            weights = (float(param == law) for param in (param0, param1) for law in range(3))
            # with no weight of the student's law dterm sums to 0 as it is
            return *weights, float(param0 == 0 or param1 == 0)
    return ()


def _low(value: float) -> float:
    """What float32 loses of an exponent: 0.3, times a log-probability of 40, is off by 4e-7."""
    return value - ctypes.c_float(value).value


def _power_constants(alpha: float, scale: float) -> tuple[float, ...]:
    """(alpha, 1 - alpha, scale, 1 / alpha, 1 / (1 - alpha), factor of term, reach of series, and
    what float32 loses of the first two)."""
    rest = 1.0 - alpha
    reach = 1.0 / max(abs(alpha), abs(rest), 1.0)
    factor = scale / (alpha * (alpha - 1.0))
    lows = _low(alpha), _low(rest)
    return alpha, rest, scale, 1.0 / alpha, 1.0 / rest, factor, reach, *lows


def _alpha_beta_constants(a: float, b: float) -> tuple[float, ...]:
    """(a, b, s, mixed, p0, px, q0, qx, cross_p, cross_q, 1 / a, 1 / b, reach, and what float32
    loses of a, b, s, cross_p, cross_q).

    Far from p = q: term = mixed p^a q^b + (p0 + px gap) p^s + (q0 + qx gap) q^s, s = a + b.
    """
    # a + b as a user means it: 0.1 - 0.1 is 0, and so is 0.3 - 0.1 - 0.2 after rounding
    s = 0.0 if abs(a + b) < 1e-12 else a + b
    mixed = p0 = px = q0 = qx = 0.0
    if a == 0 and b == 0:
        # x^2 / 2: the series is exact, and what is out of its reach is infinite
        q0 = math.inf
    elif a == 0:
        p0, q0, qx = 1 / b**2, -1 / b**2, 1 / b
    elif b == 0:
        q0, p0, px = 1 / a**2, -1 / a**2, -1 / a
    elif s == 0:
        mixed, p0, px = 1 / a**2, -1 / a**2, 1 / a
    else:
        mixed, p0, q0 = -1 / (a * b), 1 / (b * s), 1 / (a * s)
    cross_p, cross_q = (a, b) if mixed != 0 else (0.0, 0.0)
    inverse_a, inverse_b = (0.0 if x == 0 else 1 / x for x in (a, b))
    most = max(abs(a), abs(b), abs(s))
    reach = 1 / most if most > 0 else 1e30
    lows = (_low(x) for x in (a, b, s, cross_p, cross_q))
    far = mixed, p0, px, q0, qx, cross_p, cross_q
    return a, b, s, *far, inverse_a, inverse_b, reach, *lows


# -- sums over the row ---------------------------------------------------------------------------


@triton.jit
def divergence_row_sums(e, c, threshold, DIVERGENCE: tl.constexpr):
    """The summands of one entry, NUM_ROW_SUMS of them."""
    if DIVERGENCE == 3:
        overlap = e.q * mixture(e, c[0], c[1]).p_over_m
        return (tl.where(e.q == 0.0, 0.0, overlap),)
    elif DIVERGENCE == 7 or DIVERGENCE == 8 or DIVERGENCE == 10 or DIVERGENCE == 11:
        return (geometric(e, c[0], c[1], c[7], c[8], 0.0),)
    elif DIVERGENCE == 9:
        term = power_term(e, c[0], c[1], c[7], c[8], c[2], c[3])
        return (term, geometric(e, c[0], c[1], c[7], c[8], 0.0))
    elif DIVERGENCE == 13:
        distance = tl.abs(student_minus_teacher(e))
        in_head = e.lp >= threshold
        return (tl.where(in_head, distance, 0.0), tl.where(in_head, 0.0, distance))
    elif DIVERGENCE == 14:
        return (student_minus_teacher(e),)
    elif DIVERGENCE == 15:
        first, second = law_weight(e, c[0], c[1], c[2]), law_weight(e, c[3], c[4], c[5])
        is_entry = law_weight(e, 0.0, 0.0, 1.0)
        return (weighted(first, e.gap), weighted(second, e.gap), is_entry)
    else:
        return ()


@triton.jit
def _mean(total, uniform, count):
    return tl.where(uniform == 0.0, total, total / count)


@triton.jit
def divergence_row(c, sums, DIVERGENCE: tl.constexpr):
    """r of a row with these sums."""
    if DIVERGENCE == 14:
        # the common error of the gaps
        return (sums[0].to(tl.float32),)
    elif len(sums) == 1:
        # whether the laws barely overlap
        return (sums[0] < 0.5,)
    elif DIVERGENCE == 9:
        return (renyi_log_mass(c[4], sums).to(tl.float32),)
    elif DIVERGENCE == 13:
        total = sums[0] + sums[1]
        forward = tl.where(total == 0.0, 0.5, sums[0] / total)
        return (forward.to(tl.float32), (1.0 - forward).to(tl.float32))
    elif DIVERGENCE == 15:
        return (
            _mean(sums[0], c[2], sums[2]).to(tl.float32),
            _mean(sums[1], c[5], sums[2]).to(tl.float32),
            (c[2] / sums[2]).to(tl.float32),
            (c[5] / sums[2]).to(tl.float32),
        )
    else:
        return ()


@triton.jit
def divergence_value(c, total, sums, DIVERGENCE: tl.constexpr):
    """D, float64, from the sum of its terms and the sums over the row."""
    if DIVERGENCE == 9:
        return renyi_log_mass(c[4], sums) * c[5]
    elif DIVERGENCE == 15:
        first, second = _mean(sums[0], c[2], sums[2]), _mean(sums[1], c[5], sums[2])
        apart = first - second
        # an infinite gap makes its own mean infinite, and inf - inf would hide it
        is_infinite = (tl.abs(first) == float("inf")) | (tl.abs(second) == float("inf"))
        is_defined = (first == first) & (second == second)
        value = total + 0.5 * apart * apart
        return tl.where(is_infinite & is_defined, float("inf"), value)
    else:
        return total


# -- d term / d log p ----------------------------------------------------------------------------


@triton.jit
def _forward_kl(e):
    return tl.where(e.p == 0.0, 0.0, -e.p * e.gap)


@triton.jit
def _jsd(e, c):
    mix = mixture(e, c[0], c[1])
    return tl.where(e.p == 0.0, 0.0, -c[0] * e.p * mix.lm_lp)


@triton.jit
def _skew_forward_kl(e, c):
    mix = mixture(e, c[0], c[1])
    through_mixture = c[0] * (c[1] * mix.difference_over_m)
    return tl.where(e.p == 0.0, 0.0, e.p * (through_mixture - mix.lm_lp))


@triton.jit
def _skew_reverse_kl(e, c):
    # - rest q p/m, and + rest p; nothing if the mixture is detached
    mix = mixture(e, c[1], c[0])
    return tl.where(e.p == 0.0, 0.0, -(c[2] * c[1]) * e.p * c[1] * mix.difference_over_m)


@triton.jit
def divergence_dterm_teacher(e, c, r, DIVERGENCE: tl.constexpr):
    """d term / d log p of the divergence with this id, up to a multiple of p."""
    if DIVERGENCE == 0:
        return _forward_kl(e)
    elif DIVERGENCE == 1:
        return -student_minus_teacher(e)
    elif DIVERGENCE == 2:
        return _jsd(e, c)
    elif DIVERGENCE == 3:
        return _skew_forward_kl(e, c)
    elif DIVERGENCE == 4:
        return _skew_reverse_kl(e, c)
    elif DIVERGENCE == 5:
        return total_variation_dterm(swapped(e), c, r)
    elif DIVERGENCE == 6:
        return c[0] * _forward_kl(e) - c[1] * student_minus_teacher(e)
    elif DIVERGENCE == 7 or DIVERGENCE == 8 or DIVERGENCE == 10 or DIVERGENCE == 11:
        return power_dterm(swapped(e), c[1], c[0], c[8], c[7], c[2], c[4], c[6])
    elif DIVERGENCE == 9:
        return c[6] * renyi_form(swapped(e), c[1], c[0], c[8], c[7], r[0])
    elif DIVERGENCE == 12:
        return todi_dterm(swapped(e), c, r)
    elif DIVERGENCE == 13:
        return r[0] * _forward_kl(e) - r[1] * student_minus_teacher(e)
    elif DIVERGENCE == 14:
        dual = swapped(e)
        return alpha_beta_form(dual, c[1], c[0], c[2], c[14], c[13], c[15], c[11], -r[0])
    else:
        return -concrete_score_dterm(e, c, r)
