# SPDX-License-Identifier: Apache-2.0
"""Sums of powers of p and q: what Alpha, Renyi and AlphaBeta of divergences.h are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from ._entry import absent
from ._math import (
    exp_unbounded,
    exponent_times,
    log1p_float64,
    phi_over_square,
    phi_over_square_difference,
)


@triton.jit
def _log_geometric(e, alpha, rest):
    """log(p^alpha q^rest), rest = 1 - alpha: from one log-probability and the gap, which is the
    more exact of the two, or from both where one of the laws rules the token out."""
    by_both = alpha * e.lp + rest * e.lq
    return tl.where(e.gap - e.gap == 0.0, e.lp + rest * e.gap, by_both)


@triton.jit
def geometric(e, alpha, rest):
    """p^alpha q^rest."""
    return tl.where(absent(e), 0.0, exp_unbounded(_log_geometric(e, alpha, rest)))


@triton.jit
def power_term(e, alpha, rest, factor, reach):
    """factor (r - alpha p - rest q), r = p^alpha q^rest, rest = 1 - alpha."""
    x = e.gap
    y = rest * x
    # = p (phi(rest x) - rest phi(x)), phi(y) = e^y - 1 - y
    by_series = e.p * (x * x) * (rest * (rest * phi_over_square(y) - phi_over_square(x)))
    directly = (geometric(e, alpha, rest) - alpha * e.p) - rest * e.q
    near = (x < reach) & (x > -reach)
    return tl.where(absent(e), 0.0, factor * tl.where(near, by_series, directly))


@triton.jit
def power_dterm(e, alpha, rest, scale, inverse_alpha, reach):
    """scale (q - r) / alpha."""
    y = -alpha * e.gap
    by_series = e.q * (e.gap * (1.0 + y * phi_over_square(y)))
    directly = (e.q - geometric(e, alpha, rest)) * inverse_alpha
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
def renyi_form(e, alpha, rest, log_mass):
    """q - r / sum r."""
    y = -alpha * e.gap - log_mass
    by_series = -e.q * (y + (y * y) * phi_over_square(y))
    directly = e.q - exp_unbounded(_log_geometric(e, alpha, rest) - log_mass)
    near = (y < 1.0) & (y > -1.0)
    return tl.where(absent(e), 0.0, tl.where(near, by_series, directly))


@triton.jit
def alpha_beta_sum(e, c, offset):
    """term, from the constants in their order; offset is the common error of the gaps."""
    x = e.gap - offset
    ps = exp_unbounded(exponent_times(c[2], e.lp))
    qs = exp_unbounded(exponent_times(c[2], e.lq))
    cross = exp_unbounded(exponent_times(c[8], e.lp) + exponent_times(c[9], e.lq))
    sx, bx = c[2] * x, c[1] * x
    series = phi_over_square(sx) + bx * phi_over_square_difference(sx, bx)
    by_series = ps * (x * x) * series
    from_p = c[4] * ps + tl.where(ps == 0.0, 0.0, exponent_times(c[5], x) * ps)
    from_q = c[6] * qs + tl.where(qs == 0.0, 0.0, exponent_times(c[7], x) * qs)
    directly = (c[3] * cross + from_p) + from_q
    near = (x < c[12]) & (x > -c[12])
    return tl.where(absent(e), 0.0, tl.where(near, by_series, directly))


@triton.jit
def alpha_beta_form(e, a, b, s, inverse_a, offset):
    """(q^s - p^a q^b) / a; q^s gap where a = 0."""
    x = e.gap - offset
    # finite, so that y is 0 where a is
    bounded = tl.where(x > 1e30, 1e30, tl.where(x < -1e30, -1e30, x))
    y = -a * bounded
    qs = exp_unbounded(exponent_times(s, e.lq))
    cross = exp_unbounded(exponent_times(a, e.lp) + exponent_times(b, e.lq))
    by_series = tl.where(qs == 0.0, 0.0, qs * (x * (1.0 + y * phi_over_square(y))))
    directly = (qs - cross) * inverse_a
    # a = 0 is always near: y is 0 then, x however large
    near = (y < 1.0) & (y > -1.0)
    return tl.where(absent(e), 0.0, tl.where(near, by_series, directly))
