# SPDX-License-Identifier: Apache-2.0
"""The sum of divergences that a loss is: what each of its components adds to a row.

COMPONENTS are the ids, known when a kernel is compiled; a row has one tuple of scalars for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import _divergence_rows
from ._divergence_rows import (
    divergence_dterm_teacher,
    divergence_row,
    divergence_row_sums,
    divergence_value,
)
from ._divergences import divergence_dterm, divergence_term
from ._entry import absent
from ._laws import MIXTURE, load_mixed_entry

ADAPTIVE_KL = tl.constexpr(_divergence_rows.ADAPTIVE_KL)
CONCRETE_SCORE = tl.constexpr(15)
RENYI = tl.constexpr(9)
CROSS_ENTROPY = tl.constexpr(_divergence_rows.CROSS_ENTROPY)
NUM_ROW_SUMS = tl.constexpr(_divergence_rows.NUM_ROW_SUMS)
# of opd.h: doubles in a row of state, and those that each component adds
STATE = 20
STATE_PER_COMPONENT = 4
# log p beyond which a token can neither be the last of a head of several nor have mass, as bits
_LEAST_BITS = tl.constexpr(0x3F19999A)  # 0.6 < log 2
_MOST_BITS = tl.constexpr(0x42B00000)  # 88


class Loss(NamedTuple):
    """constants: a tuple for each component; coefficients [J, T] and the rest pointers or None.

    The last two are arguments of a kernel's own, which puts them here.
    """

    constants: Any
    coefficients: Any
    token_weights: Any
    labels: Any
    label_weights: Any
    num_labels: Any = None
    num_tokens: Any = None


@triton.jit
def token_weight_of(loss, row):
    weight = 1.0
    if loss.token_weights is not None:
        weight = tl.load(loss.token_weights + row)
    return weight


@triton.jit
def coefficients_of(loss, row, COMPONENTS: tl.constexpr):
    """One scalar for each component, or nothing where all are 1."""
    out = ()
    if loss.coefficients is not None:
        for j in tl.static_range(len(COMPONENTS)):
            out = out + (tl.load(loss.coefficients + (j * loss.num_tokens + row)),)
    return out


@triton.jit
def scaled(values, coefficients, j: tl.constexpr):
    """coefficient * values, where a coefficient of 0 wins over inf and NaN."""
    if len(coefficients) == 0:
        return values
    else:
        return tl.where(coefficients[j] == 0.0, 0.0, coefficients[j] * values)


@triton.jit
def _wanted(values, coefficients, j: tl.constexpr):
    if len(coefficients) == 0:
        return values
    else:
        return tl.where(coefficients[j] == 0.0, 0.0, values)


@triton.jit
def total_of(lanes):
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def reads_teacher(coefficients, COMPONENTS: tl.constexpr):
    """Whether anything but labels has a part in the loss of a row: 1 or 0."""
    out = tl.full((), 0, tl.int32)
    for j in tl.static_range(len(COMPONENTS)):
        if COMPONENTS[j] != CROSS_ENTROPY:
            if len(coefficients) == 0:
                out = tl.full((), 1, tl.int32)
            else:
                out = tl.where(coefficients[j] == 0.0, out, 1)
    return out


# -- the head of the teacher's law ---------------------------------------------------------------


@triton.jit
def _threshold(bits):
    return -bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _head_threshold(laws, shifts, c, TARGET: tl.constexpr, BLOCK_V: tl.constexpr):
    """The least log p whose {log p >= it} has mass of at most head_mass; the largest log p if that
    alone has more. Bisects the bits of -log p, four parts at a time: exact, and tied tokens stay
    together. One read of the target where a token has more than the head may, else fourteen."""
    head_mass = tl.full((), 0.0, tl.float64) + c[0] + c[1]
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    most = tl.zeros((BLOCK_V,), tl.float32)
    everything = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, laws.vocab_size, BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        e, _ = load_mixed_entry(laws, shifts, columns, columns < laws.vocab_size, TARGET)
        largest = tl.where(e.lp > largest, e.lp, largest)
        most = tl.where(e.p > most, e.p, most)
        everything += e.p
    threshold = tl.max(largest, 0)
    if tl.max(most, 0) <= head_mass:
        fits = _least_bits_that_fit(laws, shifts, head_mass, TARGET, BLOCK_V)
        # none where the most probable tokens have more together
        fitting = tl.where(_threshold(fits) > threshold, threshold, _threshold(fits))
        threshold = tl.where(total_of(everything) <= head_mass, float("-inf"), fitting)
    return threshold


@triton.jit
def _least_bits_that_fit(laws, shifts, head_mass, TARGET: tl.constexpr, BLOCK_V: tl.constexpr):
    """The bits of the largest -log p whose {-log p <= it} has mass of at most head_mass."""
    # mass at the bits `fits` is at most head_mass, at `exceeds` more
    fits = tl.full((), _LEAST_BITS, tl.int64)
    exceeds = tl.full((), _MOST_BITS, tl.int64)
    # 4^13 > _MOST_BITS - _LEAST_BITS
    for _step in range(13):
        width = exceeds - fits
        low, middle, high = fits + width // 4, fits + width // 2, fits + (3 * width) // 4
        mass_low = tl.zeros((BLOCK_V,), tl.float32)
        mass_middle = tl.zeros((BLOCK_V,), tl.float32)
        mass_high = tl.zeros((BLOCK_V,), tl.float32)
        for begin in range(0, laws.vocab_size, BLOCK_V):
            columns = begin + tl.arange(0, BLOCK_V)
            e, _ = load_mixed_entry(laws, shifts, columns, columns < laws.vocab_size, TARGET)
            mass_low += tl.where(e.lp >= _threshold(low), e.p, 0.0)
            mass_middle += tl.where(e.lp >= _threshold(middle), e.p, 0.0)
            mass_high += tl.where(e.lp >= _threshold(high), e.p, 0.0)
        low_fits = total_of(mass_low) <= head_mass
        middle_fits = total_of(mass_middle) <= head_mass
        high_fits = total_of(mass_high) <= head_mass
        above = tl.where(middle_fits, high, tl.where(low_fits, middle, low))
        exceeds = tl.where(high_fits, exceeds, above)
        below = tl.where(low_fits, low, fits)
        fits = tl.where(high_fits, high, tl.where(middle_fits, middle, below))
    return fits


@triton.jit
def thresholds_of(
    laws, loss, shifts, COMPONENTS: tl.constexpr, TARGET: tl.constexpr, BLOCK_V: tl.constexpr
):
    """log p of the least probable token of the head, for each component; 0 where it needs none."""
    out = ()
    for j in tl.static_range(len(COMPONENTS)):
        if COMPONENTS[j] == ADAPTIVE_KL:
            out = out + (_head_threshold(laws, shifts, loss.constants[j], TARGET, BLOCK_V),)
        else:
            out = out + (0.0,)
    return out


# -- sums over the row ---------------------------------------------------------------------------


@triton.jit
def _zeros(N: tl.constexpr, BLOCK_V: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros((BLOCK_V,), tl.float32),)
    return out


@triton.jit
def _add_block(lanes, values, coefficients, j: tl.constexpr):
    out = ()
    for k in tl.static_range(len(values)):
        out = out + (lanes[k] + _wanted(values[k], coefficients, j),)
    return out


@triton.jit
def _totals(lanes):
    out = ()
    for k in tl.static_range(len(lanes)):
        out = out + (total_of(lanes[k]),)
    return out


@triton.jit
def _mass_in_range(laws, c, shifts, mass, TARGET: tl.constexpr, BLOCK_V: tl.constexpr):
    """Renyi's sum r, in float64 where float32 has overflowed or underflowed: its logarithm still is
    an ordinary number. NaN stays; it is no matter of range."""
    if (mass < 1e-25) | (mass > 1e37):
        lanes = tl.zeros((BLOCK_V,), tl.float64)
        for begin in range(0, laws.vocab_size, BLOCK_V):
            columns = begin + tl.arange(0, BLOCK_V)
            e, _ = load_mixed_entry(laws, shifts, columns, columns < laws.vocab_size, TARGET)
            lp = e.lp.to(tl.float64) + e.lp_low
            lq = e.lq.to(tl.float64) + e.lq_low
            alpha = tl.zeros_like(lp) + c[0] + c[7]
            rest = tl.zeros_like(lp) + c[1] + c[8]
            lanes += tl.where(absent(e), 0.0, tl.exp(alpha * lp + rest * lq))
        mass = tl.sum(lanes, 0)
    return mass


@triton.jit
def row_sums_of(
    laws, loss, coefficients, shifts, thresholds, COMPONENTS: tl.constexpr, TARGET: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What these columns add to the sums that terms need first, for each component."""
    out = ()
    for j in tl.static_range(len(COMPONENTS)):
        lanes = _zeros(NUM_ROW_SUMS[COMPONENTS[j]], BLOCK_V)
        if NUM_ROW_SUMS[COMPONENTS[j]] > 0:
            for begin in range(0, laws.vocab_size, BLOCK_V):
                columns = begin + tl.arange(0, BLOCK_V)
                inside = columns < laws.vocab_size
                e, _ = load_mixed_entry(laws, shifts, columns, inside, TARGET)
                values = divergence_row_sums(e, loss.constants[j], thresholds[j], COMPONENTS[j])
                lanes = _add_block(lanes, values, coefficients, j)
        totals = _totals(lanes)
        if COMPONENTS[j] == RENYI:
            mass = _mass_in_range(laws, loss.constants[j], shifts, totals[1], TARGET, BLOCK_V)
            totals = (totals[0], _wanted(mass, coefficients, j))
        out = out + (totals,)
    return out


@triton.jit
def rows_of(loss, sums, COMPONENTS: tl.constexpr):
    """What the terms read of a row, from its sums, for each component."""
    out = ()
    for j in tl.static_range(len(COMPONENTS)):
        out = out + (divergence_row(loss.constants[j], sums[j], COMPONENTS[j]),)
    return out


# -- terms ---------------------------------------------------------------------------------------


@triton.jit
def add_block_terms(loss, coefficients, rows, e, lanes, COMPONENTS: tl.constexpr):
    """The sums of terms with one more block, for each component."""
    out = ()
    for j in tl.static_range(len(COMPONENTS)):
        if COMPONENTS[j] == CROSS_ENTROPY:
            out = out + (lanes[j],)
        else:
            term = divergence_term(e, loss.constants[j], rows[j], COMPONENTS[j])
            out = out + (lanes[j] + _wanted(term, coefficients, j),)
    return out


@triton.jit
def block_dterms(
    loss, coefficients, rows, e, through, COMPONENTS: tl.constexpr, TARGET: tl.constexpr,
    LIVE: tl.constexpr,
):  # fmt: skip
    """(dterm of the whole loss, the part of it that does not sum to 0 anyway, dterm_teacher where a
    geometric target is live)."""
    dterm = None
    summed = None
    teacher = None
    for j in tl.static_range(len(COMPONENTS)):
        if COMPONENTS[j] != CROSS_ENTROPY:
            c = loss.constants[j]
            own = divergence_dterm(e, c, rows[j], COMPONENTS[j])
            if LIVE:
                own_teacher = divergence_dterm_teacher(e, c, rows[j], COMPONENTS[j])
                if TARGET == MIXTURE:
                    own += through * own_teacher
                else:
                    own_teacher = scaled(own_teacher, coefficients, j)
                    teacher = own_teacher if teacher is None else teacher + own_teacher
            own = scaled(own, coefficients, j)
            dterm = own if dterm is None else dterm + own
            if COMPONENTS[j] == CONCRETE_SCORE and not (LIVE and TARGET == MIXTURE):
                # centred, it would add its rounding alone
                own = tl.where(c[6] == 0.0, 0.0, own)
            summed = own if summed is None else summed + own
    if dterm is None:
        dterm = tl.zeros_like(e.gap)
        summed = dterm
    if teacher is None:
        teacher = tl.zeros_like(e.gap)
    return dterm, summed, teacher


@triton.jit
def loss_of(loss, coefficients, terms, sums, cross_entropy, COMPONENTS: tl.constexpr):
    """sum_j coefficient_j D_j of a row, in float64."""
    total = tl.full((), 0.0, tl.float64)
    for j in tl.static_range(len(COMPONENTS)):
        if COMPONENTS[j] == CROSS_ENTROPY:
            total += scaled(cross_entropy, coefficients, j)
        else:
            value = divergence_value(loss.constants[j], terms[j], sums[j], COMPONENTS[j])
            total += scaled(value, coefficients, j)
    return total
