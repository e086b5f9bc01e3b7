# SPDX-License-Identifier: Apache-2.0
"""Single columns of a row: labels of cross_entropy, and the ids that statistics are asked for.

An id outside of the columns [first_column, first_column + vocab_size) of a slice adds nothing, a
negative one is none. On whole rows an id beyond the vocabulary, the caller's error, gives NaN: a
kernel cannot raise without a wait for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._components import CROSS_ENTROPY
from ._laws import load_side, load_target
from ._math import exp


class Ids(NamedTuple):
    """Pointers of [T] and [T, num_topk_ids], or None; the number is a kernel's own argument."""

    token_ids: Any
    topk_ids: Any
    num_topk_ids: Any = None


@triton.jit
def _columns_of(
    ids_ptr, row, count, first_column, vocab_size, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """(columns, whether they are here, 0 or NaN for an error) of the ids of a row."""
    k = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * count + k, mask=k < count, other=-1)
    columns = ids - first_column
    inside = (ids >= 0) & (columns >= 0) & (columns < vocab_size)
    error = tl.zeros((BLOCK,), tl.float32)
    if WHOLE:
        error = tl.where(ids >= vocab_size, float("nan"), 0.0)
    return columns, inside, error


@triton.jit
def _logprobs_at(laws, shifts, columns, inside, TARGET: tl.constexpr):
    """(log q, log p) of some columns."""
    student = load_side(laws.student, laws.row, columns, inside)
    target = load_target(laws, student, columns, inside, TARGET)
    lq = (student - shifts.student_high) - shifts.student_low
    return lq, (target - shifts.teacher_high) - shifts.teacher_low


@triton.jit
def _sum_where(inside, values, error):
    return tl.sum(tl.where(inside, values, error).to(tl.float64), 0)


@triton.jit
def id_statistics(
    laws, ids, shifts, row, first_column, WHOLE: tl.constexpr, TARGET: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
):  # fmt: skip
    """What these columns add to log q and log p of token_ids and to the masses of topk_ids."""
    zero = tl.full((), 0.0, tl.float64)
    lq, lp, q, p = zero, zero, zero, zero
    if ids.token_ids is not None:
        columns, inside, error = _columns_of(
            ids.token_ids, row, 1, first_column, laws.vocab_size, WHOLE, 1
        )
        if WHOLE:
            error = tl.where(inside, 0.0, float("nan"))
        log_q, log_p = _logprobs_at(laws, shifts, columns, inside, TARGET)
        lq, lp = _sum_where(inside, log_q, error), _sum_where(inside, log_p, error)
    if ids.topk_ids is not None:
        columns, inside, error = _columns_of(
            ids.topk_ids, row, ids.num_topk_ids, first_column, laws.vocab_size, WHOLE, BLOCK_TOPK
        )
        log_q, log_p = _logprobs_at(laws, shifts, columns, inside, TARGET)
        q = _sum_where(inside, exp(log_q), error)
        p = _sum_where(inside, exp(log_p), error)
    return lq, lp, q, p


@triton.jit
def _label_weights(loss, row, BLOCK_LABELS: tl.constexpr):
    k = tl.arange(0, BLOCK_LABELS)
    weights = tl.full((BLOCK_LABELS,), 1.0, tl.float32)
    if loss.label_weights is not None:
        at = row * loss.num_labels + k
        weights = tl.load(loss.label_weights + at, mask=k < loss.num_labels, other=0.0)
    return weights


@triton.jit
def cross_entropy_of(
    laws, loss, shifts, row, first_column, WHOLE: tl.constexpr, TARGET: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
):  # fmt: skip
    """What these columns add to -sum_k weight_k log q(label_k)."""
    total = tl.full((), 0.0, tl.float64)
    if loss.labels is not None:
        columns, inside, error = _columns_of(
            loss.labels, row, loss.num_labels, first_column, laws.vocab_size, WHOLE, BLOCK_LABELS
        )
        weights = _label_weights(loss, row, BLOCK_LABELS)
        inside = inside & (weights != 0.0)
        lq, _ = _logprobs_at(laws, shifts, columns, inside, TARGET)
        total -= _sum_where(inside, weights.to(tl.float64) * lq.to(tl.float64), error)
    return total


@triton.jit
def label_coefficient(coefficients, COMPONENTS: tl.constexpr):
    """The coefficient of cross_entropy in the loss, summed."""
    out = tl.full((), 0.0, tl.float32)
    for j in tl.static_range(len(COMPONENTS)):
        if COMPONENTS[j] == CROSS_ENTROPY:
            if len(coefficients) == 0:
                out += 1.0
            else:
                out += coefficients[j]
    return out


@triton.jit
def label_sum(loss, coefficient, row, BLOCK_LABELS: tl.constexpr):
    """Sum of what the labels take from dterm: all of them, whichever columns are here."""
    k = tl.arange(0, BLOCK_LABELS)
    inside = k < loss.num_labels
    labels = tl.load(loss.labels + row * loss.num_labels + k, mask=inside, other=-1)
    weights = _label_weights(loss, row, BLOCK_LABELS)
    return coefficient * tl.sum(tl.where(labels >= 0, weights, 0.0).to(tl.float64), 0)


@triton.jit
def has_labels(loss, coefficient, row, BLOCK_LABELS: tl.constexpr):
    """Whether a label has a part in the loss of a row: how many have, or 0."""
    if loss.labels is None:
        return tl.full((), 0, tl.int32)
    else:
        k = tl.arange(0, BLOCK_LABELS)
        labels = tl.load(
            loss.labels + row * loss.num_labels + k, mask=k < loss.num_labels, other=-1
        )
        weights = _label_weights(loss, row, BLOCK_LABELS)
        count = tl.sum(tl.where(labels >= 0, (weights != 0.0).to(tl.int32), 0), 0)
        return tl.where(coefficient == 0.0, 0, count)


@triton.jit
def subtract_labels(loss, coefficient, row, columns, first_column, dterm):
    """dterm of a block of columns, with the labels' part."""
    if loss.labels is None:
        return dterm
    else:
        for k in range(0, loss.num_labels):
            at = row * loss.num_labels + k
            label = tl.load(loss.labels + at)
            weight = coefficient
            if loss.label_weights is not None:
                weight = coefficient * tl.load(loss.label_weights + at)
            dterm = tl.where(columns + first_column == label, dterm - weight, dterm)
        return dterm
