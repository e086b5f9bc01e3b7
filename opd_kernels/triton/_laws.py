# SPDX-License-Identifier: Apache-2.0
"""Rows of logits become laws: options of a side, the target, and entries of both.

What a call does not use is None, which a kernel is compiled without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._entry import Entry, absent, mixture
from ._math import difference, exp, softcap
from ._rows import add_to_lanes, close_lanes, open_lanes, split

TEACHER = tl.constexpr(0)
GEOMETRIC = tl.constexpr(1)
MIXTURE = tl.constexpr(2)


class Side(NamedTuple):
    """softcap(scale * (logits + bias)) / temperature; temperatures is a pointer, and wins."""

    logits: Any
    stride: Any
    bias: Any
    scale: Any
    softcap: Any
    temperature: Any
    temperatures: Any


class Laws(NamedTuple):
    """The three sides and the target: coefficients of a geometric one, weights of a mixture.

    row is that of a program, whose columns are vocab_size. A kernel makes it in place: Triton 3.6
    lets no device function return a None.
    """

    student: Any
    teacher: Any
    reference: Any
    from_student: Any
    from_teacher: Any
    from_reference: Any
    mixture_weights: Any
    vocab_size: Any
    row: Any = None


class Shifts(NamedTuple):
    """The log-sum-exps, and their difference, each as two float32."""

    student_high: Any
    student_low: Any
    teacher_high: Any
    teacher_low: Any
    gap_high: Any
    gap_low: Any


@triton.jit
def load_uncapped(side, row, columns, inside):
    """scale * (logits + bias) in float32; -inf where not inside, before a scale."""
    row_ptr = side.logits + row * side.stride
    logits = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if side.bias is not None:
        logits = logits + tl.load(side.bias + columns, mask=inside, other=0.0)
    if side.scale is not None:
        logits = side.scale * logits
    return logits


@triton.jit
def load_side(side, row, columns, inside):
    """The logits that a law is the softmax of; -inf where not inside, where nothing has mass."""
    logits = load_uncapped(side, row, columns, inside)
    if side.softcap is not None:
        logits = softcap(logits, side.softcap)
    if side.temperatures is not None:
        logits = tl.div_rn(logits, tl.load(side.temperatures + row))
    elif side.temperature is not None:
        logits = tl.div_rn(logits, side.temperature)
    if side.scale is not None or side.softcap is not None:
        logits = tl.where(inside, logits, float("-inf"))
    return logits


@triton.jit
def slope_of(side, row, factor):
    """factor * d (the logits of the law) / d logits, but for a softcap."""
    if side.scale is not None:
        factor = factor * side.scale
    if side.temperatures is not None:
        factor = factor / tl.load(side.temperatures + row)
    elif side.temperature is not None:
        factor = factor / side.temperature
    return factor


@triton.jit
def _add_scaled(total, factor, logits):
    # a token that one of the laws rules out stays out, whatever the sign of the others
    is_out = (total == float("-inf")) | (logits == float("-inf"))
    return tl.where(is_out, float("-inf"), total + factor * logits)


@triton.jit
def load_target(laws, student, columns, inside, TARGET: tl.constexpr):
    """Logits of the teacher, or of the geometric mean that stands in for it."""
    logits = load_side(laws.teacher, laws.row, columns, inside)
    if TARGET == GEOMETRIC:
        if laws.from_teacher is None:
            logits = tl.zeros_like(logits)
        else:
            scaled = laws.from_teacher * logits
            logits = tl.where(logits == float("-inf"), logits, scaled)
        if laws.from_student is not None:
            logits = _add_scaled(logits, laws.from_student, student)
        if laws.from_reference is not None:
            reference = load_side(laws.reference, laws.row, columns, inside)
            logits = _add_scaled(logits, laws.from_reference, reference)
        logits = tl.where(inside, logits, float("-inf"))
    return logits


@triton.jit
def add_lse(
    laws, largest, total, argmax, first_column, OF_STUDENT: tl.constexpr, TARGET: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(largest, sum relative to it, column of the largest) in float64, with these columns added."""
    lanes, sums, where_largest = open_lanes(BLOCK_V)
    for begin in range(0, laws.vocab_size, BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        inside = columns < laws.vocab_size
        logits = None
        if OF_STUDENT or laws.from_student is not None:
            logits = load_side(laws.student, laws.row, columns, inside)
        if not OF_STUDENT:
            logits = load_target(laws, logits, columns, inside, TARGET)
        lanes, sums, where_largest = add_to_lanes(logits, columns, lanes, sums, where_largest)
    here, here_total, where_here = close_lanes(lanes, sums, where_largest, laws.vocab_size)
    here = here.to(tl.float64)
    is_larger = here > largest
    # e^-inf of a finite distance from -inf, 1 of no distance
    distance = tl.where(here == largest, 0.0, -tl.abs(here - largest))
    decay = tl.exp(distance)
    total = tl.where(is_larger, total * decay + here_total, total + here_total * decay)
    argmax = tl.where(is_larger, (first_column + where_here).to(tl.float64), argmax)
    return tl.where(is_larger, here, largest), total, argmax


@triton.jit
def shifts_of(student_lse, teacher_lse):
    student_high, student_low = split(student_lse)
    teacher_high, teacher_low = split(teacher_lse)
    gap_high, gap_low = split(student_lse - teacher_lse)
    return Shifts(student_high, student_low, teacher_high, teacher_low, gap_high, gap_low)


@triton.jit
def _logprob(logits, high, low):
    """(logits - high - low rounded once, what that rounding lost)."""
    # what a difference has lost goes with the low part of the shift
    below, lost = difference(logits, high)
    return difference(below, low - lost)


@triton.jit
def load_entry(laws, shifts, columns, inside, TARGET: tl.constexpr):
    """Entries of student and target, a mixture not yet mixed."""
    student = load_side(laws.student, laws.row, columns, inside)
    target = load_target(laws, student, columns, inside, TARGET)
    lq, lq_low = _logprob(student, shifts.student_high, shifts.student_low)
    lp, lp_low = _logprob(target, shifts.teacher_high, shifts.teacher_low)
    gap, lost = difference(student, target)
    gap = (gap - shifts.gap_high) - (shifts.gap_low - lost)
    return Entry(lp, lq, exp(lp), exp(lq), gap, lp_low, lq_low)


@triton.jit
def _of_ends(weight, of_teacher, of_student, between):
    return tl.where(weight == 1.0, of_teacher, tl.where(weight == 0.0, of_student, between))


@triton.jit
def mix_target(laws, e, TARGET: tl.constexpr):
    """(e with the mixture as its teacher, d log mixture / d log q through the student in it)."""
    if TARGET == MIXTURE:
        weight = tl.load(laws.mixture_weights + laws.row)
        mix = mixture(e, weight, 1.0 - weight)
        lm = tl.where(e.gap <= 0.0, e.lp + mix.lm_lp, e.lq + mix.lm_lq)
        through = (1.0 - weight) * mix.q_over_m
        # the ends apart: the logarithm of 0 times something is no number
        is_absent = absent(e)
        lp = _of_ends(weight, e.lp, e.lq, tl.where(is_absent, e.lp, lm))
        p = _of_ends(weight, e.p, e.q, tl.where(is_absent, e.p, mix.m))
        gap = _of_ends(weight, e.gap, 0.0, tl.where(is_absent, e.gap, -mix.lm_lq))
        through = _of_ends(weight, 0.0, 1.0, tl.where(is_absent, 0.0, through))
        lp_low = _of_ends(weight, e.lp_low, 0.0, tl.zeros_like(e.lp_low))
        return Entry(lp, e.lq, p, e.q, gap, lp_low, e.lq_low), through
    else:
        return e, 0.0


@triton.jit
def load_mixed_entry(laws, shifts, columns, inside, TARGET: tl.constexpr):
    return mix_target(laws, load_entry(laws, shifts, columns, inside, TARGET), TARGET)
