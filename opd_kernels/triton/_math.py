# SPDX-License-Identifier: Apache-2.0
"""Elementary functions in float32, as in csrc/include/opd/math.h: same names, same guards.

tl.exp multiplies by log2(e) in one rounding, an error that grows with |x|; and neither expm1 nor
log1p exists outside the vendors' device libraries, which the interpreter lacks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _reduce(x):
    """x = n ln 2 + r with |r| <= ln 2 / 2, for -87.33 <= x <= 88; returns (r, 2^n)."""
    # adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits
    shifted = x * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) + n * 2.12194440054690583e-4
    bits = (shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)
    return r, bits.to(tl.float32, bitcast=True)


@triton.jit
def _expm1_reduced(r):
    poly = 1.9908904505427957e-4 * r + 1.3934543821960688e-3
    poly = poly * r + 8.33328440785408e-3
    poly = poly * r + 4.166645556688309e-2
    poly = poly * r + 0.1666666716337204
    poly = poly * r + 0.5
    return poly * (r * r) + r


@triton.jit
def exp(x):
    """e^x for x <= 88; exactly 0 for x < -87.33 (so exp(-inf) == 0), NaN for NaN."""
    r, scale = _reduce(tl.where(x < -87.33, -87.33, x))
    # the vendors' fast exponential is off by two units in the last place, which near 1, where one
    # token has all the mass, is all that some gradients consist of
    return tl.where(x < -87.33, 0.0, _expm1_reduced(r) * scale + scale)


@triton.jit
def exp_unbounded(x):
    """e^x, where x may be above 88: inf there."""
    result = exp(tl.where(x > 88.0, 88.0, x))
    return tl.where(x > 88.0, float("inf"), result)


@triton.jit
def zero_times(factor, x):
    """factor * x with 0 * inf = 0: a power of exponent 0 is 1 and a weight of 0 leaves out."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def difference(a, b):
    """(a - b rounded, what rounding lost): their sum is exact. inf and NaN have lost nothing."""
    rounded = a - b
    back = rounded - a
    lost = (a - (rounded - back)) - (b + back)
    return rounded, tl.where(rounded - rounded == 0.0, lost, 0.0)


@triton.jit
def exp_of_sum(a, x, b, y, shift, low):
    """e^(a x + b y - shift + low), low small, the rounding of the exponent put back.

    At an exponent of 60 it alone would cost 4e-6 of the result. A factor of 0 leaves its side out,
    infinite or not.
    """
    first, second = zero_times(a, x), zero_times(b, y)
    total = first + second
    back = total - first
    lost = (first - (total - back)) + (second - back)
    lost += tl.fma(a, x, -first) + tl.fma(b, y, -second)
    exponent, lost_shift = difference(total, shift)
    value = exp_unbounded(exponent)
    more = value * (lost + (lost_shift + low))
    # nothing is lost where something is infinite
    return tl.where(more - more == 0.0, value + more, value)


@triton.jit
def exp_minus_distance(x, y):
    """e^-|x - y| with the rounding of x - y put back, up to 2e-7 of the result at |x - y| = 8."""
    distance, lost = difference(x, y)
    result = exp(-tl.abs(distance))
    return result + result * tl.where(distance < 0.0, lost, -lost)


@triton.jit
def exp_pair_nonpositive(x):
    """(e^x, e^x - 1) for x <= 0, right to the last bits; exactly 0 and -1 below -87.33."""
    r, scale = _reduce(tl.where(x < -87.33, -87.33, x))
    em1 = _expm1_reduced(r)
    return tl.where(x < -87.33, 0.0, em1 * scale + scale), em1 * scale + (scale - 1.0)


@triton.jit
def log_mix(ratio, excess, keep, weight):
    """log(keep + weight e^x), keep + weight = 1, from the pair (e^x, e^x - 1), x <= 0."""
    f = weight * excess
    value = keep + weight * ratio
    poly = -7.859894633293152e-2 * f + 0.12885838747024536
    poly = poly * f - 0.13130463659763336
    poly = poly * f + 0.14180703461170197
    poly = poly * f - 0.16624347865581512
    poly = poly * f + 0.20002302527427673
    poly = poly * f - 0.25000816583633423
    poly = poly * f + 0.33333316445350647
    square = f * f
    near = f - 0.5 * square + (square * f) * poly
    return tl.where(value > 0.7072, near, tl.log(value))


@triton.jit
def phi_over_square(x):
    """(e^x - 1 - x) / x^2 for |x| < 1, by its series; 1/2 at 0."""
    poly = 2.7722801405616337e-6 * x + 2.535482963139657e-5
    poly = poly * x + 1.9844024791382253e-4
    poly = poly * x + 1.388545148074627e-3
    poly = poly * x + 8.33331048488617e-3
    poly = poly * x + 4.166673496365547e-2
    poly = poly * x + 0.1666666716337204
    return poly * x + 0.5


@triton.jit
def phi_over_square_difference(x, y):
    """(phi_over_square(x) - phi_over_square(y)) / (x - y) for |x|, |y| < 1, no cancellation.

    Horner's rule on 1 / (k + 2)! and, beside it, on its divided difference.
    """
    value = y * (1.0 / 39916800) + 1.0 / 3628800
    slope = x * 0.0 + 1.0 / 39916800
    slope, value = slope * x + value, value * y + 1.0 / 362880
    slope, value = slope * x + value, value * y + 1.0 / 40320
    slope, value = slope * x + value, value * y + 1.0 / 5040
    slope, value = slope * x + value, value * y + 1.0 / 720
    slope, value = slope * x + value, value * y + 1.0 / 120
    slope, value = slope * x + value, value * y + 1.0 / 24
    slope, value = slope * x + value, value * y + 1.0 / 6
    return slope * x + value


@triton.jit
def bregman(a, b, x):
    """a (e^x - 1 - x) >= 0, where b = a e^x; a == 0 gives b, its limit."""
    near = a * ((x * x) * phi_over_square(x))
    far = (b - a) - a * x
    return tl.where(a == 0.0, b, tl.where((x < 1.0) & (x > -1.0), near, far))


@triton.jit
def softcap(x, cap):
    """cap tanh(x / cap), exact near 0."""
    x = x * tl.div_rn(2.0, cap)
    decay, excess = exp_pair_nonpositive(tl.where(x > 0.0, -x, x))
    size = tl.div_rn(cap * excess, 1.0 + decay)
    return tl.where(x > 0.0, -size, size)


@triton.jit
def softcap_slope(x, cap):
    """1 - tanh(x / cap)^2."""
    x = x * tl.div_rn(2.0, cap)
    decay, _ = exp_pair_nonpositive(tl.where(x > 0.0, -x, x))
    return tl.div_rn(4.0 * decay, (1.0 + decay) * (1.0 + decay))


@triton.jit
def log1p_float64(x):
    """log(1 + x) in float64: the logarithm of the rounded 1 + x, times what rounding did to x."""
    rounded = 1.0 + x
    apart = rounded - 1.0
    return tl.where(apart == 0.0, x, tl.log(rounded) * (x / apart))
