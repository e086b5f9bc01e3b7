# SPDX-License-Identifier: Apache-2.0
"""Sums of powers of p and q: what Alpha, Renyi and AlphaBeta of divergences.h are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from ._entry import absent
from ._math import (
    exp_of_sum,
    log1p_float64,
    phi_over_square,
    phi_over_square_difference,
    zero_times,
)


@triton.jit
def geometric(e, alpha, rest, alpha_low, rest_low, shift):
    """p^alpha q^rest e^-shift, rest = 1 - alpha.

    The low parts keep the exponent, which cancels where the laws are close, exact to the square of
    a rounding. alpha_low and rest_low are what float32 loses of the exponents.
    """
    low = (alpha * e.lp_low + alpha_low * e.lp) + (rest * e.lq_low + rest_low * e.lq)
    return tl.where(absent(e), 0.0, exp_of_sum(alpha, e.lp, rest, e.lq, shift, low))


@triton.jit
def power_term(e, alpha, rest, alpha_low, rest_low, factor, reach):
    """factor (r - alpha p - rest q), r = p^alpha q^rest, rest = 1 - alpha."""
    x = e.gap
    y = rest * x
    # = p (phi(rest x) - rest phi(x)), phi(y) = e^y - 1 - y
    by_series = e.p * (x * x) * (rest * (rest * phi_over_square(y) - phi_over_square(x)))
    r = geometric(e, alpha, rest, alpha_low, rest_low, 0.0)
    directly = (r - alpha * e.p) - rest * e.q
    near = (x < reach) & (x > -reach)
    return tl.where(absent(e), 0.0, factor * tl.where(near, by_series, directly))


@triton.jit
def power_dterm(e, alpha, rest, alpha_low, rest_low, scale, inverse_alpha, reach):
    """scale (q - r) / alpha."""
    y = -alpha * e.gap
    by_series = e.q * (e.gap * (1.0 + y * phi_over_square(y)))
    r = geometric(e, alpha, rest, alpha_low, rest_low, 0.0)
    directly = (e.q - r) * inverse_alpha
    near = (e.gap < reach) & (e.gap > -reach)
    return tl.where(absent(e), 0.0, scale * tl.where(near, by_series, directly))


@triton.jit
def renyi_log_mass(product, sums):
    """log sum r, float64, from (sum of power_term, sum r); product is alpha (alpha - 1).

    From the divergence where the mass is near 1, from the mass itself elsewhere.
    """
    is_near = (sums[1] > 0.5) & (sums[1] < 2.0)
    near = log1p_float64(product * sums[0])
    return tl.where(is_near, near, tl.log(sums[1]))


@triton.jit
def renyi_form(e, alpha, rest, alpha_low, rest_low, log_mass):
    """q - r / sum r."""
    y = -alpha * e.gap - log_mass
    by_series = -e.q * (y + (y * y) * phi_over_square(y))
    directly = e.q - geometric(e, alpha, rest, alpha_low, rest_low, log_mass)
    near = (y < 1.0) & (y > -1.0)
    return tl.where(absent(e), 0.0, tl.where(near, by_series, directly))


@triton.jit
def _low(exponent, exponent_low, x, x_low):
    """Of exponent * x, what its rounded factors have lost."""
    return exponent * x_low + exponent_low * x


@triton.jit
def alpha_beta_sum(e, c, offset):
    """term, from the constants in their order; offset is the common error of the gaps."""
    x = e.gap - offset
    ps = exp_of_sum(c[2], e.lp, 0.0, 0.0, 0.0, _low(c[2], c[15], e.lp, e.lp_low))
    qs = exp_of_sum(c[2], e.lq, 0.0, 0.0, 0.0, _low(c[2], c[15], e.lq, e.lq_low))
    low = _low(c[8], c[16], e.lp, e.lp_low) + _low(c[9], c[17], e.lq, e.lq_low)
    cross = exp_of_sum(c[8], e.lp, c[9], e.lq, 0.0, low)
    sx, bx = c[2] * x, c[1] * x
    series = phi_over_square(sx) + bx * phi_over_square_difference(sx, bx)
    by_series = ps * (x * x) * series
    from_p = c[4] * ps + tl.where(ps == 0.0, 0.0, zero_times(c[5], x) * ps)
    from_q = c[6] * qs + tl.where(qs == 0.0, 0.0, zero_times(c[7], x) * qs)
    directly = (c[3] * cross + from_p) + from_q
    # powers that overflow against each other: the term itself grows without bound
    directly = tl.where((directly == directly) | (x != x), directly, float("inf"))
    near = (x < c[12]) & (x > -c[12])
    # NaN stays NaN where an exponent of 0 would leave it out
    value = tl.where(x != x, x, tl.where(near, by_series, directly))
    return tl.where(absent(e), 0.0, value)


@triton.jit
def alpha_beta_form(e, a, b, s, a_low, b_low, s_low, inverse_a, offset):
    """(q^s - p^a q^b) / a; q^s gap where a = 0."""
    x = e.gap - offset
    # finite, so that y is 0 where a is
    bounded = tl.where(x > 1e30, 1e30, tl.where(x < -1e30, -1e30, x))
    y = -a * bounded
    qs = exp_of_sum(s, e.lq, 0.0, 0.0, 0.0, _low(s, s_low, e.lq, e.lq_low))
    low = _low(a, a_low, e.lp, e.lp_low) + _low(b, b_low, e.lq, e.lq_low)
    cross = exp_of_sum(a, e.lp, b, e.lq, 0.0, low)
    by_series = tl.where(qs == 0.0, 0.0, qs * (x * (1.0 + y * phi_over_square(y))))
    directly = (qs - cross) * inverse_a
    # a = 0 is always near: y is 0 then, x however large
    near = (y < 1.0) & (y > -1.0)
    value = tl.where(x != x, x, tl.where(near, by_series, directly))
    return tl.where(absent(e), 0.0, value)
