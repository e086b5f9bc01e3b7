# SPDX-License-Identifier: Apache-2.0
"""Divergences in phases, for slices of a vocabulary: what each adds to a row of state.

A call sees the columns [first_column, first_column + vocab_size) of a row. The backward of whole
rows is that of a row's only slice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._components import (
    Loss,
    coefficients_of,
    row_sums_of,
    rows_of,
    thresholds_of,
    token_weight_of,
)
from ._ids import Ids, cross_entropy_of, label_coefficient
from ._laws import Laws, add_lse, shifts_of, slope_of
from ._packing import NUM_STATISTICS, Packed, has_row_sums, takes_laws
from ._rows import COUNTS, gradient_in_place, launch
from ._state import (
    CROSS_ENTROPY_SUM,
    GRAD_SUM,
    STATISTICS,
    STUDENT_ARGMAX,
    STUDENT_LARGEST,
    STUDENT_LSE,
    TEACHER_ARGMAX,
    TEACHER_GRAD_SUM,
    TEACHER_LSE,
    load_row_sums,
    load_terms,
    put_row_sums,
    put_statistics,
    put_terms,
    state_row,
    zero_state,
)
from ._whole_rows import (
    columns_with_gradient,
    full_grad_sum,
    statistics_of,
    store_gradient,
    store_loss,
    store_nothing,
    store_statistics,
    terms_of,
)

LSE, ROW_SUMS, TERMS, OPEN, CLOSE_LSE, FINISH = range(6)


@triton.jit
def _shifts_of_row(state_row_ptr):
    return shifts_of(tl.load(state_row_ptr + STUDENT_LSE), tl.load(state_row_ptr + TEACHER_LSE))


@triton.jit(do_not_specialize=COUNTS)
def _lse_kernel(
    laws, loss, state_ptr, first_column, COMPONENTS: tl.constexpr, TARGET: tl.constexpr,
    WITH_STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    state_row_ptr = state_row(state_ptr, row, COMPONENTS)
    if token_weight_of(loss, row) != 0.0:
        here = Laws(
            laws.student, laws.teacher, laws.reference, laws.from_student, laws.from_teacher,
            laws.from_reference, laws.mixture_weights, laws.vocab_size, row,
        )  # fmt: skip
        for k in tl.static_range(2):
            lse_ptr = state_row_ptr + STUDENT_LSE + k
            largest_ptr = state_row_ptr + STUDENT_LARGEST + k
            argmax_ptr = state_row_ptr + STUDENT_ARGMAX + k
            largest, total, argmax = add_lse(
                here, tl.load(largest_ptr), tl.load(lse_ptr), tl.load(argmax_ptr), first_column,
                k == 0, TARGET, BLOCK_V,
            )  # fmt: skip
            tl.store(largest_ptr, largest)
            tl.store(lse_ptr, total)
            if WITH_STATISTICS:
                tl.store(argmax_ptr, argmax)


@triton.jit(do_not_specialize=COUNTS)
def _row_sums_kernel(
    laws, loss, num_tokens, state_ptr, COMPONENTS: tl.constexpr, TARGET: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    loss = Loss(*loss[:5], None, num_tokens)
    state_row_ptr = state_row(state_ptr, row, COMPONENTS)
    if token_weight_of(loss, row) != 0.0:
        here = Laws(
            laws.student, laws.teacher, laws.reference, laws.from_student, laws.from_teacher,
            laws.from_reference, laws.mixture_weights, laws.vocab_size, row,
        )  # fmt: skip
        coefficients = coefficients_of(loss, row, COMPONENTS)
        shifts = _shifts_of_row(state_row_ptr)
        thresholds = thresholds_of(here, loss, shifts, COMPONENTS, TARGET, BLOCK_V)
        sums = row_sums_of(
            here, loss, coefficients, shifts, thresholds, COMPONENTS, TARGET, BLOCK_V
        )
        put_row_sums(state_row_ptr, sums, COMPONENTS, True)


@triton.jit(do_not_specialize=COUNTS)
def _terms_kernel(
    laws, loss, ids, num_tokens, num_labels, num_topk_ids, state_ptr, first_column,
    COMPONENTS: tl.constexpr, TARGET: tl.constexpr, LIVE: tl.constexpr,
    WITH_STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_LABELS: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    loss = Loss(*loss[:5], 1 if BLOCK_LABELS == 1 else num_labels, num_tokens)
    ids = Ids(ids.token_ids, ids.topk_ids, num_topk_ids)
    state_row_ptr = state_row(state_ptr, row, COMPONENTS)
    if token_weight_of(loss, row) != 0.0:
        here = Laws(
            laws.student, laws.teacher, laws.reference, laws.from_student, laws.from_teacher,
            laws.from_reference, laws.mixture_weights, laws.vocab_size, row,
        )  # fmt: skip
        coefficients = coefficients_of(loss, row, COMPONENTS)
        shifts = _shifts_of_row(state_row_ptr)
        rows = rows_of(loss, load_row_sums(state_row_ptr, COMPONENTS), COMPONENTS)
        cross_entropy = cross_entropy_of(
            here, loss, shifts, row, first_column, False, TARGET, BLOCK_LABELS
        )
        statistics = statistics_of(
            here,
            ids,
            shifts,
            row,
            first_column,
            False,
            TARGET,
            WITH_STATISTICS,
            BLOCK_TOPK,
            BLOCK_V,
        )
        put_statistics(state_row_ptr, statistics, cross_entropy, True)
        terms, grad_sum, teacher_grad_sum = terms_of(
            here, loss, coefficients, None, rows, shifts, row, None, None, COMPONENTS, TARGET,
            LIVE, BLOCK_V,
        )  # fmt: skip
        put_terms(state_row_ptr, terms, grad_sum, teacher_grad_sum, COMPONENTS, True)


@triton.jit(do_not_specialize=COUNTS)
def _finish_kernel(
    loss, num_tokens, state_ptr, loss_ptr, statistics_ptr, COMPONENTS: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    loss = Loss(*loss[:5], None, num_tokens)
    state_row_ptr = state_row(state_ptr, row, COMPONENTS)
    weight = token_weight_of(loss, row)
    if weight == 0.0:
        zero_state(state_row_ptr, COMPONENTS)
        store_nothing(loss_ptr, statistics_ptr, row, loss.num_tokens, WITH_STATISTICS)
    else:
        statistics = ()
        if WITH_STATISTICS:
            for k in tl.static_range(8):
                statistics = statistics + (tl.load(state_row_ptr + STATISTICS + k),)
        store_statistics(
            statistics, tl.load(state_row_ptr + STUDENT_LSE), tl.load(state_row_ptr + TEACHER_LSE),
            tl.load(state_row_ptr + STUDENT_ARGMAX), tl.load(state_row_ptr + TEACHER_ARGMAX),
            statistics_ptr, row, loss.num_tokens,
        )  # fmt: skip
        store_loss(
            loss, coefficients_of(loss, row, COMPONENTS), load_terms(state_row_ptr, COMPONENTS),
            load_row_sums(state_row_ptr, COMPONENTS), tl.load(state_row_ptr + CROSS_ENTROPY_SUM),
            weight, loss_ptr, row, COMPONENTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _divergence_bwd_kernel(
    laws, loss, num_tokens, num_labels, grad_loss_ptr, state_ptr, grad_ptr, stride_grad,
    grad_width, first_column, COMPONENTS: tl.constexpr, TARGET: tl.constexpr, LIVE: tl.constexpr,
    NARROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_LABELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # one label is compiled for: what it reads once is not read again for each tile
    loss = Loss(*loss[:5], 1 if BLOCK_LABELS == 1 else num_labels, num_tokens)
    state_row_ptr = state_row(state_ptr, row, COMPONENTS)
    weight = token_weight_of(loss, row)
    grad_loss = tl.load(grad_loss_ptr + row)
    # weight 0 wins over an infinite upstream gradient, and such a row is not read
    coefficients = coefficients_of(loss, row, COMPONENTS)
    label_weight = label_coefficient(coefficients, COMPONENTS)
    columns = columns_with_gradient(
        laws, loss, coefficients, label_weight, row, COMPONENTS, BLOCK_LABELS
    )
    readable = tl.where((weight == 0.0) | (grad_loss == 0.0), 0, columns)
    here = Laws(
        laws.student, laws.teacher, laws.reference, laws.from_student, laws.from_teacher,
        laws.from_reference, laws.mixture_weights, readable, row,
    )  # fmt: skip
    rows = rows_of(loss, load_row_sums(state_row_ptr, COMPONENTS), COMPONENTS)
    grad_sums = full_grad_sum(
        loss, label_weight, tl.load(state_row_ptr + GRAD_SUM), row, BLOCK_LABELS
    )
    teacher_grad_sum = tl.load(state_row_ptr + TEACHER_GRAD_SUM).to(tl.float32)
    store_gradient(
        here, loss, coefficients, label_weight, rows, _shifts_of_row(state_row_ptr), row,
        first_column, grad_sums, teacher_grad_sum, slope_of(laws.student, row, weight * grad_loss),
        grad_ptr + row * stride_grad, grad_width, COMPONENTS, TARGET, LIVE, NARROWS, BLOCK_V,
    )  # fmt: skip


def launch_bwd(
    packed: Packed,
    grad_loss: Tensor,
    state: Tensor,
    grad: Tensor,
    first_column: int,
    narrows: bool = False,
) -> None:
    """Writes the gradient of the call's columns, and zeros beyond them.

    narrows: grad lies in the rows of float32 logits and has half their width.
    """
    names = ("COMPONENTS", "TARGET", "LIVE", "BLOCK_V", "BLOCK_LABELS")
    launch(
        _divergence_bwd_kernel, grad.shape[0], packed.num_warps, packed.laws, packed.loss,
        packed.num_tokens, packed.num_labels, grad_loss, state, grad, grad.stride(0),
        grad.shape[1], first_column, NARROWS=narrows, maxnreg=packed.max_registers,
        **{name: packed.constants[name] for name in names},
    )  # fmt: skip


@takes_laws
def divergence_phase_(
    state: Tensor,
    packed: Packed,
    phase: int,
    first_column: int,
    with_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, statistics) of `opd::divergence_phase_`: empty but for the last phase."""
    if packed.needs_whole_rows and phase in (LSE, ROW_SUMS, TERMS):
        raise RuntimeError("divergence: adaptive_kl sorts the teacher's law and needs whole rows")
    finishes = phase == FINISH
    num_tokens = state.shape[0]
    loss = state.new_empty(num_tokens if finishes else 0, dtype=torch.float32)
    statistics = loss.new_empty(NUM_STATISTICS, num_tokens if finishes and with_statistics else 0)
    if phase == OPEN:
        _open(state)
    elif phase == CLOSE_LSE:
        _close_lse(state, packed.loss.token_weights)
    else:
        _launch_phase(packed, phase, state, first_column, loss, statistics, with_statistics)
    return loss, statistics


def _open(state: Tensor) -> None:
    state.zero_()
    state[:, STUDENT_LARGEST.value : STUDENT_LARGEST.value + 2] = float("-inf")
    state[:, STUDENT_ARGMAX.value : STUDENT_ARGMAX.value + 2] = -1.0


def _close_lse(state: Tensor, token_weights: Tensor | None) -> None:
    lse = state[:, STUDENT_LSE.value : STUDENT_LSE.value + 2]
    closed = state[:, STUDENT_LARGEST.value : STUDENT_LARGEST.value + 2] + lse.log()
    if token_weights is not None:
        closed = torch.where((token_weights == 0).unsqueeze(1), lse, closed)
    lse.copy_(closed)


def _launch_phase(
    packed: Packed, phase: int, state: Tensor, first_column: int, loss: Tensor,
    statistics: Tensor, with_statistics: bool,
) -> None:  # fmt: skip
    constants = {**packed.constants, "maxnreg": packed.max_registers}
    chosen = {name: constants[name] for name in ("COMPONENTS", "TARGET", "BLOCK_V", "maxnreg")}
    if phase == LSE:
        launch(
            _lse_kernel, state.shape[0], packed.num_warps, packed.laws, packed.loss, state,
            first_column, WITH_STATISTICS=with_statistics, **chosen,
        )  # fmt: skip
    elif phase == ROW_SUMS and has_row_sums(packed.components):
        launch(
            _row_sums_kernel,
            state.shape[0],
            packed.num_warps,
            packed.laws,
            packed.loss,
            packed.num_tokens,
            state,
            **chosen,
        )
    elif phase == TERMS:
        launch(
            _terms_kernel, state.shape[0], packed.num_warps, *packed[:6], state, first_column,
            WITH_STATISTICS=with_statistics, **constants,
        )  # fmt: skip
    elif phase == FINISH:
        launch(
            _finish_kernel, state.shape[0], 1, packed.loss, packed.num_tokens, state, loss,
            statistics, COMPONENTS=packed.components, WITH_STATISTICS=with_statistics,
        )  # fmt: skip


@takes_laws
def divergence_bwd_(
    grad_loss: Tensor, state: Tensor, packed: Packed, first_column: int, grad_dtype: int
) -> None:
    """`opd::divergence_bwd_`: the gradient overwrites the float32 student logits."""
    grad = gradient_in_place(packed.laws.student.logits, grad_dtype)
    launch_bwd(packed, grad_loss, state, grad, first_column, narrows=grad_dtype != -1)
