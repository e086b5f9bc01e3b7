# SPDX-License-Identifier: Apache-2.0
"""Divergences of two rows of logits, one program per row: log-sum-exps, sums, terms, gradient.

The launchers have the signatures of the `opd` schemas; those for slices of a vocabulary are in
_divergence_phases.py. A plain divergence reads each logit twice (three times with the gradient in
place, once more where sums over the row come first); sums are in BLOCK_V float32 lanes, so that
results do not depend on the grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._components import (
    ADAPTIVE_KL,
    Loss,
    coefficients_of,
    row_sums_of,
    rows_of,
    thresholds_of,
    token_weight_of,
)
from ._divergence_phases import divergence_bwd_, divergence_phase_, launch_bwd
from ._ids import Ids, cross_entropy_of, label_coefficient
from ._laws import Laws, add_lse, shifts_of, slope_of
from ._packing import NUM_STATISTICS, Packed, takes_laws
from ._rows import COUNTS, gradient_in_place, launch
from ._state import (
    STUDENT_ARGMAX,
    STUDENT_LARGEST,
    STUDENT_LSE,
    THRESHOLD,
    component_row,
    put_row_sums,
    put_statistics,
    put_terms,
    state_row,
    zero_state,
)
from ._whole_rows import (
    columns_with_gradient,
    full_grad_sum,
    minus_share,
    statistics_of,
    store_gradient,
    store_loss,
    store_nothing,
    store_statistics,
    terms_of,
)

__all__ = [
    "divergence_bwd",
    "divergence_bwd_",
    "divergence_fwd",
    "divergence_fwd_grad_",
    "divergence_phase_",
]


@triton.jit
def _open_row(
    laws, loss, ids, coefficients, statistics_ptr, row, COMPONENTS: tl.constexpr,
    TARGET: tl.constexpr, WITH_STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_LABELS: tl.constexpr, BLOCK_TOPK: tl.constexpr,
):  # fmt: skip
    """All but the terms, which read the logits once more: what they need, and the statistics.

    (largest, lse, argmax) of student and of target, shifts, cross-entropy, statistics, thresholds,
    row sums.
    """
    nothing = float("-inf")
    student, student_total, student_argmax = add_lse(
        laws, nothing, 0.0, -1.0, 0, True, TARGET, BLOCK_V
    )
    teacher, teacher_total, teacher_argmax = add_lse(
        laws, nothing, 0.0, -1.0, 0, False, TARGET, BLOCK_V
    )
    student_lse = student + tl.log(student_total)
    teacher_lse = teacher + tl.log(teacher_total)
    shifts = shifts_of(student_lse, teacher_lse)
    cross_entropy = cross_entropy_of(laws, loss, shifts, row, 0, True, TARGET, BLOCK_LABELS)
    statistics = statistics_of(
        laws, ids, shifts, row, 0, True, TARGET, WITH_STATISTICS, BLOCK_TOPK, BLOCK_V
    )
    store_statistics(
        statistics, student_lse, teacher_lse, student_argmax, teacher_argmax, statistics_ptr, row,
        loss.num_tokens,
    )  # fmt: skip
    thresholds = thresholds_of(laws, loss, shifts, COMPONENTS, TARGET, BLOCK_V)
    sums = row_sums_of(laws, loss, coefficients, shifts, thresholds, COMPONENTS, TARGET, BLOCK_V)
    return (
        (student, student_lse, student_argmax), (teacher, teacher_lse, teacher_argmax), shifts,
        cross_entropy, statistics, thresholds, sums,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _divergence_fwd_kernel(
    laws, loss, ids, num_tokens, num_labels, num_topk_ids, state_ptr, loss_ptr, statistics_ptr,
    COMPONENTS: tl.constexpr, TARGET: tl.constexpr, LIVE: tl.constexpr,
    WITH_STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_LABELS: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # one label is compiled for: what it reads once is not read again for each tile
    loss = Loss(*loss[:5], 1 if BLOCK_LABELS == 1 else num_labels, num_tokens)
    ids = Ids(ids.token_ids, ids.topk_ids, num_topk_ids)
    state_row_ptr = state_row(state_ptr, row, COMPONENTS)
    weight = token_weight_of(loss, row)
    zero_state(state_row_ptr, COMPONENTS)
    if weight == 0.0:
        store_nothing(loss_ptr, statistics_ptr, row, loss.num_tokens, WITH_STATISTICS)
    else:
        # the thread that stores a scalar may not be the one that zeroed it
        tl.debug_barrier()
        here = Laws(
            laws.student, laws.teacher, laws.reference, laws.from_student, laws.from_teacher,
            laws.from_reference, laws.mixture_weights, laws.vocab_size, row,
        )  # fmt: skip
        coefficients = coefficients_of(loss, row, COMPONENTS)
        student, teacher, shifts, cross_entropy, statistics, thresholds, sums = _open_row(
            here, loss, ids, coefficients, statistics_ptr, row, COMPONENTS, TARGET,
            WITH_STATISTICS, BLOCK_V, BLOCK_LABELS, BLOCK_TOPK,
        )  # fmt: skip
        # before the terms, which need the registers
        for k in tl.static_range(2):
            side = student if k == 0 else teacher
            tl.store(state_row_ptr + STUDENT_LSE + k, side[1])
            tl.store(state_row_ptr + STUDENT_LARGEST + k, side[0])
            argmax = side[2] if WITH_STATISTICS else -1.0
            tl.store(state_row_ptr + STUDENT_ARGMAX + k, argmax)
        for j in tl.static_range(len(COMPONENTS)):
            if COMPONENTS[j] == ADAPTIVE_KL:
                tl.store(component_row(state_row_ptr, j) + THRESHOLD, thresholds[j])
        put_row_sums(state_row_ptr, sums, COMPONENTS, False)
        put_statistics(state_row_ptr, statistics, cross_entropy, False)
        rows = rows_of(loss, sums, COMPONENTS)
        terms, grad_sum, teacher_grad_sum = terms_of(
            here, loss, coefficients, None, rows, shifts, row, None, None, COMPONENTS, TARGET,
            LIVE, BLOCK_V,
        )  # fmt: skip
        put_terms(state_row_ptr, terms, grad_sum, teacher_grad_sum, COMPONENTS, False)
        store_loss(
            loss, coefficients, terms, sums, cross_entropy, weight, loss_ptr, row, COMPONENTS
        )


@triton.jit(do_not_specialize=COUNTS)
def _divergence_fwd_grad_kernel(
    laws, loss, ids, num_tokens, num_labels, num_topk_ids, loss_ptr, statistics_ptr, grad_ptr,
    stride_grad, COMPONENTS: tl.constexpr, TARGET: tl.constexpr, LIVE: tl.constexpr,
    WITH_STATISTICS: tl.constexpr, OVERWRITES_TWICE: tl.constexpr, NARROWS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_LABELS: tl.constexpr, BLOCK_TOPK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # one label is compiled for: what it reads once is not read again for each tile
    loss = Loss(*loss[:5], 1 if BLOCK_LABELS == 1 else num_labels, num_tokens)
    ids = Ids(ids.token_ids, ids.topk_ids, num_topk_ids)
    weight = token_weight_of(loss, row)
    student_row_ptr = laws.student.logits + row * laws.student.stride
    grad_row_ptr = grad_ptr + row * stride_grad
    if weight == 0.0:
        store_nothing(loss_ptr, statistics_ptr, row, loss.num_tokens, WITH_STATISTICS)
        for begin in range(0, laws.vocab_size, BLOCK_V):
            columns = begin + tl.arange(0, BLOCK_V)
            zero = tl.zeros((BLOCK_V,), grad_ptr.dtype.element_ty)
            tl.store(grad_row_ptr + columns, zero, mask=columns < laws.vocab_size)
    else:
        here = Laws(
            laws.student, laws.teacher, laws.reference, laws.from_student, laws.from_teacher,
            laws.from_reference, laws.mixture_weights, laws.vocab_size, row,
        )  # fmt: skip
        coefficients = coefficients_of(loss, row, COMPONENTS)
        _, _, shifts, cross_entropy, _, _, sums = _open_row(
            here, loss, ids, coefficients, statistics_ptr, row, COMPONENTS, TARGET,
            WITH_STATISTICS, BLOCK_V, BLOCK_LABELS, BLOCK_TOPK,
        )  # fmt: skip
        rows = rows_of(loss, sums, COMPONENTS)
        label_weight = label_coefficient(coefficients, COMPONENTS)
        dterm_row_ptr, q_row_ptr = None, None
        if OVERWRITES_TWICE:
            dterm_row_ptr, q_row_ptr = (
                student_row_ptr,
                laws.teacher.logits + row * laws.teacher.stride,
            )
            # a logit of a label may have been read by a thread that is not through yet
            tl.debug_barrier()
        terms, grad_sum, teacher_grad_sum = terms_of(
            here, loss, coefficients, label_weight, rows, shifts, row, dterm_row_ptr, q_row_ptr,
            COMPONENTS, TARGET, LIVE, BLOCK_V,
        )  # fmt: skip
        store_loss(
            loss, coefficients, terms, sums, cross_entropy, weight, loss_ptr, row, COMPONENTS
        )
        scale = slope_of(laws.student, row, weight)
        grad_sums = full_grad_sum(loss, label_weight, grad_sum, row, BLOCK_LABELS)
        # the thread that reads a column may not be the one that wrote it
        tl.debug_barrier()
        readable = columns_with_gradient(
            laws, loss, coefficients, label_weight, row, COMPONENTS, BLOCK_LABELS
        )
        if OVERWRITES_TWICE:
            for begin in range(0, laws.vocab_size, BLOCK_V):
                columns = begin + tl.arange(0, BLOCK_V)
                inside = columns < laws.vocab_size
                dterm = tl.load(student_row_ptr + columns, mask=inside, other=0.0)
                q = tl.load(q_row_ptr + columns, mask=columns < readable, other=0.0)
                gradient = scale * minus_share(dterm, q, grad_sums)
                gradient = gradient.to(grad_ptr.dtype.element_ty)
                if NARROWS:
                    tl.debug_barrier()
                tl.store(grad_row_ptr + columns, gradient, mask=inside)
        else:
            silent = Laws(
                laws.student, laws.teacher, laws.reference, laws.from_student, laws.from_teacher,
                laws.from_reference, laws.mixture_weights, readable, row,
            )  # fmt: skip
            store_gradient(
                silent, loss, coefficients, label_weight, rows, shifts,
                row, 0, grad_sums, teacher_grad_sum.to(tl.float32), scale, grad_row_ptr,
                laws.vocab_size, COMPONENTS, TARGET, LIVE, NARROWS, BLOCK_V,
            )  # fmt: skip


@takes_laws
def divergence_fwd(
    packed: Packed,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, state, statistics) of `opd::divergence_fwd`."""
    student_logits = packed.laws.student.logits
    num_tokens = student_logits.shape[0]
    loss = student_logits.new_empty(num_tokens, dtype=torch.float32)
    state = loss.new_empty(num_tokens, packed.state_size, dtype=torch.float64)
    statistics = loss.new_empty(NUM_STATISTICS, num_tokens if with_statistics else 0)
    launch(
        _divergence_fwd_kernel, num_tokens, packed.num_warps, *packed[:6], state, loss,
        statistics, WITH_STATISTICS=with_statistics, maxnreg=packed.max_registers,
        **packed.constants,
    )  # fmt: skip
    return loss, state, statistics


@takes_laws
def divergence_bwd(
    grad_loss: Tensor,
    state: Tensor,
    packed: Packed,
) -> Tensor:
    """grad_student_logits of `opd::divergence_bwd`, zero beyond `vocab_size`."""
    student_logits = packed.laws.student.logits
    grad_student_logits = student_logits.new_empty(student_logits.shape)
    launch_bwd(packed, grad_loss, state, grad_student_logits, 0)
    return grad_student_logits


@takes_laws
def divergence_fwd_grad_(
    packed: Packed,
    with_statistics: bool,
    grad_dtype: int,
) -> tuple[Tensor, Tensor]:
    """(loss, statistics) of `opd::divergence_fwd_grad_`; student_logits becomes the gradient."""
    student_logits = packed.laws.student.logits
    num_tokens = student_logits.shape[0]
    loss = student_logits.new_empty(num_tokens, dtype=torch.float32)
    statistics = loss.new_empty(NUM_STATISTICS, num_tokens if with_statistics else 0)
    grad = gradient_in_place(student_logits, grad_dtype)
    launch(
        _divergence_fwd_grad_kernel, num_tokens, packed.num_warps, *packed[:6], loss,
        statistics, grad, grad.stride(0), NARROWS=grad_dtype != -1, WITH_STATISTICS=with_statistics,
        OVERWRITES_TWICE=packed.overwrites_twice, maxnreg=packed.max_registers, **packed.constants,
    )  # fmt: skip
    return loss, statistics
