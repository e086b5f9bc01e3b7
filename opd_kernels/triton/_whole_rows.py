# SPDX-License-Identifier: Apache-2.0
"""The passes over a row that whole rows and slices share: terms, statistics, gradient, outcome."""

from __future__ import annotations

import triton
import triton.language as tl

from ._components import add_block_terms, block_dterms, loss_of, reads_teacher, total_of
from ._divergences import forward_kl_term, reverse_kl_term
from ._ids import has_labels, id_statistics, label_sum, subtract_labels
from ._laws import GEOMETRIC, load_entry, load_mixed_entry, load_uncapped
from ._math import softcap_slope
from ._rows import split


@triton.jit
def statistics_of(
    laws, ids, shifts, row, first_column, WHOLE: tl.constexpr, TARGET: tl.constexpr,
    WITH_STATISTICS: tl.constexpr, BLOCK_TOPK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What these columns add to entropies, KLs, log-probabilities and masses; or nothing."""
    if WITH_STATISTICS:
        student_entropy = tl.zeros((BLOCK_V,), tl.float32)
        teacher_entropy = tl.zeros((BLOCK_V,), tl.float32)
        forward_kl = tl.zeros((BLOCK_V,), tl.float32)
        reverse_kl = tl.zeros((BLOCK_V,), tl.float32)
        for begin in range(0, laws.vocab_size, BLOCK_V):
            columns = begin + tl.arange(0, BLOCK_V)
            e = load_entry(laws, shifts, columns, columns < laws.vocab_size, TARGET)
            student_entropy -= tl.where(e.q == 0.0, 0.0, e.q * e.lq)
            teacher_entropy -= tl.where(e.p == 0.0, 0.0, e.p * e.lp)
            forward_kl += forward_kl_term(e, (), ())
            reverse_kl += reverse_kl_term(e, (), ())
        lq, lp, q, p = id_statistics(
            laws, ids, shifts, row, first_column, WHOLE, TARGET, BLOCK_TOPK
        )
        return (
            total_of(student_entropy), total_of(teacher_entropy), total_of(forward_kl),
            total_of(reverse_kl), lq, lp, q, p,
        )  # fmt: skip
    else:
        return ()


@triton.jit
def terms_of(
    laws, loss, coefficients, label_weight, rows, shifts, row, dterm_row_ptr, q_row_ptr,
    COMPONENTS: tl.constexpr, TARGET: tl.constexpr, LIVE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(sums of terms, sum of dterm, sum of dterm_teacher) of these columns.

    Given pointers, leaves dterm (less the labels' part) and q there.
    """
    lanes = ()
    for _ in tl.static_range(len(COMPONENTS)):
        lanes = lanes + (tl.zeros((BLOCK_V,), tl.float32),)
    dterm_sum = tl.zeros((BLOCK_V,), tl.float32)
    teacher_sum = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, laws.vocab_size, BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        inside = columns < laws.vocab_size
        e, through = load_mixed_entry(laws, shifts, columns, inside, TARGET)
        lanes = add_block_terms(loss, coefficients, rows, e, lanes, COMPONENTS)
        dterm, summed, teacher = block_dterms(
            loss, coefficients, rows, e, through, COMPONENTS, TARGET, LIVE
        )
        dterm_sum += summed
        if LIVE and TARGET == GEOMETRIC:
            teacher_sum += teacher
        if dterm_row_ptr is not None:
            dterm = subtract_labels(loss, label_weight, row, columns, 0, dterm)
            tl.store(dterm_row_ptr + columns, dterm, mask=inside)
            tl.store(q_row_ptr + columns, e.q, mask=inside)
    terms = ()
    for j in tl.static_range(len(COMPONENTS)):
        terms = terms + (total_of(lanes[j]),)
    return terms, total_of(dterm_sum), total_of(teacher_sum)


@triton.jit
def columns_with_gradient(
    laws, loss, coefficients, label_weight, row, COMPONENTS: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
):  # fmt: skip
    """All columns, or none where nothing in the row has a gradient: 0 wins over NaN logits."""
    labels = has_labels(loss, label_weight, row, BLOCK_LABELS)
    return tl.where(reads_teacher(coefficients, COMPONENTS) + labels == 0, 0, laws.vocab_size)


@triton.jit
def full_grad_sum(loss, label_weight, grad_sum, row, BLOCK_LABELS: tl.constexpr):
    """Sum of dterm, the labels' part included, as two float32: near a sum of 1 or 1/2, where the
    student has all but one token ruled out, the gradient is what rounding would leave of it."""
    if loss.labels is not None:
        grad_sum = grad_sum - label_sum(loss, label_weight, row, BLOCK_LABELS)
    return split(grad_sum)


@triton.jit
def minus_share(dterm, q, grad_sums):
    return (dterm - q * grad_sums[0]) - q * grad_sums[1]


@triton.jit
def store_gradient(
    laws, loss, coefficients, label_weight, rows, shifts, row, first_column, grad_sums,
    teacher_grad_sum, scale, grad_row_ptr, grad_width, COMPONENTS: tl.constexpr,
    TARGET: tl.constexpr, LIVE: tl.constexpr, NARROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """scale * d loss / d logits, 0 beyond the columns of the laws; may overwrite the logits.

    NARROWS: with values of half their width.
    """
    for begin in range(0, grad_width, BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        inside = columns < laws.vocab_size
        e, through = load_mixed_entry(laws, shifts, columns, inside, TARGET)
        dterm, _, teacher = block_dterms(
            loss, coefficients, rows, e, through, COMPONENTS, TARGET, LIVE
        )
        gradient = minus_share(dterm, e.q, grad_sums)
        if LIVE and TARGET == GEOMETRIC:
            through = laws.from_student * (teacher - e.p * teacher_grad_sum)
            gradient += tl.where(reads_teacher(coefficients, COMPONENTS) == 0, 0.0, through)
        gradient = subtract_labels(loss, label_weight, row, columns, first_column, gradient)
        if laws.student.softcap is not None:
            logits = load_uncapped(laws.student, laws.row, columns, inside)
            gradient *= softcap_slope(logits, laws.student.softcap)
        gradient = tl.where(inside, scale * gradient, 0.0)
        gradient = gradient.to(grad_row_ptr.dtype.element_ty)
        if NARROWS:
            # what this tile overwrites, other threads have read by now
            tl.debug_barrier()
        tl.store(grad_row_ptr + columns, gradient, mask=columns < grad_width)


@triton.jit
def store_loss(
    loss, coefficients, terms, sums, cross_entropy, weight, loss_ptr, row,
    COMPONENTS: tl.constexpr,
):  # fmt: skip
    total = loss_of(loss, coefficients, terms, sums, cross_entropy, COMPONENTS)
    tl.store(loss_ptr + row, weight * total)


@triton.jit
def store_statistics(
    statistics, student_lse, teacher_lse, student_argmax, teacher_argmax, statistics_ptr, row,
    num_tokens,
):  # fmt: skip
    """The eight scalars of statistics_of and what the log-sum-exps say; or nothing."""
    if len(statistics) > 0:
        for k in tl.static_range(4):
            tl.store(statistics_ptr + (k * num_tokens + row), statistics[k])
            tl.store(statistics_ptr + ((7 + k) * num_tokens + row), statistics[4 + k])
        tl.store(statistics_ptr + (5 * num_tokens + row), student_lse)
        tl.store(statistics_ptr + (6 * num_tokens + row), teacher_lse)
        defined = (student_lse == student_lse) & (teacher_lse == teacher_lse)
        agree = tl.where(student_argmax == teacher_argmax, 1.0, 0.0)
        agree = tl.where(defined, agree, float("nan"))
        tl.store(statistics_ptr + (4 * num_tokens + row), agree)


@triton.jit
def store_nothing(loss_ptr, statistics_ptr, row, num_tokens, WITH_STATISTICS: tl.constexpr):
    """Zeros: a row of weight 0."""
    tl.store(loss_ptr + row, 0.0)
    if WITH_STATISTICS:
        for k in tl.static_range(11):
            tl.store(statistics_ptr + (k * num_tokens + row), 0.0)
