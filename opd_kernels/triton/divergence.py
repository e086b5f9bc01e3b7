# SPDX-License-Identifier: Apache-2.0
"""Divergence of two rows of logits, one program per row: two log-sum-exps, then term and dterm.

The three launchers have the signatures of the `opd` schemas. Reads each logit twice (three times
with the gradient in place, once more for skew_forward_kl); sums in BLOCK_V float32 lanes, so that
results do not depend on the grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._divergences import (
    DIVERGENCES,
    divergence_dterm,
    divergence_term,
    forward_kl_term,
    parameters,
    reverse_kl_term,
    skew_forward_kl_overlap,
)
from ._math import difference, exp
from ._rows import launch, load_logits, row_lse, split, tile

NUM_STATISTICS = 5
SKEW_FORWARD_KL = tl.constexpr(DIVERGENCES.index("skew_forward_kl"))


@triton.jit
def _load_entry(
    student_row_ptr, teacher_row_ptr, columns, vocab_size, student_temperature,
    teacher_temperature, student_lse, teacher_lse, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """(lp, lq, p, q, gap) of a block of columns."""
    student_high, student_low = split(student_lse)
    teacher_high, teacher_low = split(teacher_lse)
    gap_high, gap_low = split(student_lse - teacher_lse)
    student = load_logits(
        student_row_ptr, columns, vocab_size, student_temperature, HAS_TEMPERATURE
    )
    teacher = load_logits(
        teacher_row_ptr, columns, vocab_size, teacher_temperature, HAS_TEMPERATURE
    )
    lq = (student - student_high) - student_low
    lp = (teacher - teacher_high) - teacher_low
    gap, lost = difference(student, teacher)
    gap = (gap - gap_high) - (gap_low - lost)
    return lp, lq, exp(lp), exp(lq), gap


@triton.jit
def _form_of_row(
    student_row_ptr, teacher_row_ptr, vocab_size, student_temperature, teacher_temperature,
    student_lse, teacher_lse, weight, rest, live, DIVERGENCE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`live` as dterm takes it: for skew_forward_kl 1 where the laws barely overlap, else 0.

    Backward decides again, from the same numbers and so alike.
    """
    form = live
    if DIVERGENCE == SKEW_FORWARD_KL:
        lanes = tl.arange(0, BLOCK_V)
        overlap = tl.zeros((BLOCK_V,), tl.float32)
        for begin in range(0, vocab_size, BLOCK_V):
            _, _, p, q, gap = _load_entry(
                student_row_ptr, teacher_row_ptr, begin + lanes, vocab_size, student_temperature,
                teacher_temperature, student_lse, teacher_lse, HAS_TEMPERATURE,
            )  # fmt: skip
            overlap += skew_forward_kl_overlap(p, q, gap, weight, rest)
        form = tl.where(tl.sum(overlap, 0) < 0.5, 1.0, 0.0)
    return form


@triton.jit
def _top1_agreement(student_argmax, teacher_argmax, student_lse, teacher_lse):
    defined = (student_lse == student_lse) & (teacher_lse == teacher_lse)
    return tl.where(defined, (student_argmax == teacher_argmax).to(tl.float32), float("nan"))


@triton.jit
def _store_statistics(
    statistics_ptr, row, num_tokens, student_entropy, teacher_entropy, forward_kl, reverse_kl,
    top1_agreement,
):  # fmt: skip
    tl.store(statistics_ptr + row, student_entropy)
    tl.store(statistics_ptr + num_tokens + row, teacher_entropy)
    tl.store(statistics_ptr + 2 * num_tokens + row, forward_kl)
    tl.store(statistics_ptr + 3 * num_tokens + row, reverse_kl)
    tl.store(statistics_ptr + 4 * num_tokens + row, top1_agreement)


@triton.jit
def _row_statistics(
    student_row_ptr, teacher_row_ptr, vocab_size, student_temperature, teacher_temperature,
    student_lse, teacher_lse, HAS_TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(student entropy, teacher entropy, forward KL, reverse KL) of a row."""
    lanes = tl.arange(0, BLOCK_V)
    student_entropy = tl.zeros((BLOCK_V,), tl.float32)
    teacher_entropy = tl.zeros((BLOCK_V,), tl.float32)
    forward_kl = tl.zeros((BLOCK_V,), tl.float32)
    reverse_kl = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, vocab_size, BLOCK_V):
        lp, lq, p, q, gap = _load_entry(
            student_row_ptr, teacher_row_ptr, begin + lanes, vocab_size, student_temperature,
            teacher_temperature, student_lse, teacher_lse, HAS_TEMPERATURE,
        )  # fmt: skip
        student_entropy -= tl.where(q == 0.0, 0.0, q * lq)
        teacher_entropy -= tl.where(p == 0.0, 0.0, p * lp)
        forward_kl += forward_kl_term(p, q, gap, 0.0, 0.0, 0.0)
        reverse_kl += reverse_kl_term(p, q, gap, 0.0, 0.0, 0.0)
    return (
        tl.sum(student_entropy, 0),
        tl.sum(teacher_entropy, 0),
        tl.sum(forward_kl, 0),
        tl.sum(reverse_kl, 0),
    )


@triton.jit
def _divergence_fwd_kernel(
    student_logits_ptr, teacher_logits_ptr, token_weights_ptr, loss_ptr, student_lse_ptr,
    teacher_lse_ptr, grad_sum_ptr, statistics_ptr, num_tokens, vocab_size, stride_student,
    stride_teacher, student_temperature, teacher_temperature, weight, rest, live,
    DIVERGENCE: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    WITH_STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_row_ptr = student_logits_ptr + row * stride_student
    teacher_row_ptr = teacher_logits_ptr + row * stride_teacher
    token_weight = 1.0
    if HAS_WEIGHTS:
        token_weight = tl.load(token_weights_ptr + row)
    if token_weight == 0.0:
        tl.store(loss_ptr + row, 0.0)
        tl.store(grad_sum_ptr + row, 0.0)
        tl.store(student_lse_ptr + row, 0.0)
        tl.store(teacher_lse_ptr + row, 0.0)
        if WITH_STATISTICS:
            _store_statistics(statistics_ptr, row, num_tokens, 0.0, 0.0, 0.0, 0.0, 0.0)
    else:
        student_lse, student_argmax = row_lse(
            student_row_ptr, vocab_size, student_temperature, HAS_TEMPERATURE, BLOCK_V
        )
        teacher_lse, teacher_argmax = row_lse(
            teacher_row_ptr, vocab_size, teacher_temperature, HAS_TEMPERATURE, BLOCK_V
        )
        form = _form_of_row(
            student_row_ptr, teacher_row_ptr, vocab_size, student_temperature,
            teacher_temperature, student_lse, teacher_lse, weight, rest, live, DIVERGENCE,
            HAS_TEMPERATURE, BLOCK_V,
        )  # fmt: skip
        lanes = tl.arange(0, BLOCK_V)
        term_sum = tl.zeros((BLOCK_V,), tl.float32)
        dterm_sum = tl.zeros((BLOCK_V,), tl.float32)
        for begin in range(0, vocab_size, BLOCK_V):
            _, _, p, q, gap = _load_entry(
                student_row_ptr, teacher_row_ptr, begin + lanes, vocab_size, student_temperature,
                teacher_temperature, student_lse, teacher_lse, HAS_TEMPERATURE,
            )  # fmt: skip
            term_sum += divergence_term(p, q, gap, weight, rest, live, DIVERGENCE)
            dterm_sum += divergence_dterm(p, q, gap, weight, rest, form, DIVERGENCE)
        tl.store(loss_ptr + row, token_weight * tl.sum(term_sum, 0))
        tl.store(grad_sum_ptr + row, tl.sum(dterm_sum, 0))
        tl.store(student_lse_ptr + row, student_lse)
        tl.store(teacher_lse_ptr + row, teacher_lse)
        if WITH_STATISTICS:
            student_entropy, teacher_entropy, forward_kl, reverse_kl = _row_statistics(
                student_row_ptr, teacher_row_ptr, vocab_size, student_temperature,
                teacher_temperature, student_lse, teacher_lse, HAS_TEMPERATURE, BLOCK_V,
            )  # fmt: skip
            _store_statistics(
                statistics_ptr, row, num_tokens, student_entropy, teacher_entropy, forward_kl,
                reverse_kl,
                _top1_agreement(student_argmax, teacher_argmax, student_lse, teacher_lse),
            )  # fmt: skip


@triton.jit
def _divergence_bwd_kernel(
    grad_loss_ptr, student_logits_ptr, teacher_logits_ptr, token_weights_ptr, student_lse_ptr,
    teacher_lse_ptr, grad_sum_ptr, grad_student_logits_ptr, vocab_size, grad_width,
    stride_student, stride_teacher, stride_grad, student_temperature, teacher_temperature,
    weight, rest, live, DIVERGENCE: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_row_ptr = student_logits_ptr + row * stride_student
    teacher_row_ptr = teacher_logits_ptr + row * stride_teacher
    grad_row_ptr = grad_student_logits_ptr + row * stride_grad
    scale = tl.load(grad_loss_ptr + row)
    if HAS_WEIGHTS:
        token_weight = tl.load(token_weights_ptr + row)
        # weight 0 wins over an infinite upstream gradient
        scale = tl.where(token_weight == 0.0, 0.0, token_weight * scale)
    scale = scale / student_temperature
    student_lse = tl.load(student_lse_ptr + row)
    teacher_lse = tl.load(teacher_lse_ptr + row)
    grad_sum = tl.load(grad_sum_ptr + row)
    # a row that counts for nothing is not read, so that NaN in it stays there
    readable = tl.where(scale == 0.0, 0, vocab_size)
    form = _form_of_row(
        student_row_ptr, teacher_row_ptr, readable, student_temperature,
        teacher_temperature, student_lse, teacher_lse, weight, rest, live, DIVERGENCE,
        HAS_TEMPERATURE, BLOCK_V,
    )  # fmt: skip
    lanes = tl.arange(0, BLOCK_V)
    for begin in range(0, grad_width, BLOCK_V):
        columns = begin + lanes
        _, _, p, q, gap = _load_entry(
            student_row_ptr, teacher_row_ptr, columns, readable, student_temperature,
            teacher_temperature, student_lse, teacher_lse, HAS_TEMPERATURE,
        )  # fmt: skip
        dterm = divergence_dterm(p, q, gap, weight, rest, form, DIVERGENCE)
        gradient = tl.where(columns < readable, scale * (dterm - q * grad_sum), 0.0)
        gradient = gradient.to(grad_student_logits_ptr.dtype.element_ty)
        tl.store(grad_row_ptr + columns, gradient, mask=columns < grad_width)


@triton.jit
def _divergence_fwd_grad_kernel(
    student_logits_ptr, teacher_logits_ptr, token_weights_ptr, loss_ptr, statistics_ptr,
    num_tokens, vocab_size, stride_student, stride_teacher, student_temperature,
    teacher_temperature, weight, rest, live, DIVERGENCE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    WITH_STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_row_ptr = student_logits_ptr + row * stride_student
    teacher_row_ptr = teacher_logits_ptr + row * stride_teacher
    lanes = tl.arange(0, BLOCK_V)
    token_weight = 1.0
    if HAS_WEIGHTS:
        token_weight = tl.load(token_weights_ptr + row)
    if token_weight == 0.0:
        tl.store(loss_ptr + row, 0.0)
        if WITH_STATISTICS:
            _store_statistics(statistics_ptr, row, num_tokens, 0.0, 0.0, 0.0, 0.0, 0.0)
        for begin in range(0, vocab_size, BLOCK_V):
            columns = begin + lanes
            zero = tl.zeros((BLOCK_V,), tl.float32)
            tl.store(student_row_ptr + columns, zero, mask=columns < vocab_size)
    else:
        student_lse, student_argmax = row_lse(
            student_row_ptr, vocab_size, student_temperature, HAS_TEMPERATURE, BLOCK_V
        )
        teacher_lse, teacher_argmax = row_lse(
            teacher_row_ptr, vocab_size, teacher_temperature, HAS_TEMPERATURE, BLOCK_V
        )
        if WITH_STATISTICS:
            student_entropy, teacher_entropy, forward_kl, reverse_kl = _row_statistics(
                student_row_ptr, teacher_row_ptr, vocab_size, student_temperature,
                teacher_temperature, student_lse, teacher_lse, HAS_TEMPERATURE, BLOCK_V,
            )  # fmt: skip
            _store_statistics(
                statistics_ptr, row, num_tokens, student_entropy, teacher_entropy, forward_kl,
                reverse_kl,
                _top1_agreement(student_argmax, teacher_argmax, student_lse, teacher_lse),
            )  # fmt: skip
        form = _form_of_row(
            student_row_ptr, teacher_row_ptr, vocab_size, student_temperature,
            teacher_temperature, student_lse, teacher_lse, weight, rest, live, DIVERGENCE,
            HAS_TEMPERATURE, BLOCK_V,
        )  # fmt: skip
        term_sum = tl.zeros((BLOCK_V,), tl.float32)
        dterm_sum = tl.zeros((BLOCK_V,), tl.float32)
        for begin in range(0, vocab_size, BLOCK_V):
            columns = begin + lanes
            _, _, p, q, gap = _load_entry(
                student_row_ptr, teacher_row_ptr, columns, vocab_size, student_temperature,
                teacher_temperature, student_lse, teacher_lse, HAS_TEMPERATURE,
            )  # fmt: skip
            term_sum += divergence_term(p, q, gap, weight, rest, live, DIVERGENCE)
            dterm = divergence_dterm(p, q, gap, weight, rest, form, DIVERGENCE)
            dterm_sum += dterm
            tl.store(student_row_ptr + columns, dterm, mask=columns < vocab_size)
            tl.store(teacher_row_ptr + columns, q, mask=columns < vocab_size)
        tl.store(loss_ptr + row, token_weight * tl.sum(term_sum, 0))
        scale = token_weight / student_temperature
        grad_sum = tl.sum(dterm_sum, 0)
        # the thread that reads a column may not be the one that wrote it
        tl.debug_barrier()
        for begin in range(0, vocab_size, BLOCK_V):
            columns = begin + lanes
            inside = columns < vocab_size
            dterm = tl.load(student_row_ptr + columns, mask=inside, other=0.0)
            q = tl.load(teacher_row_ptr + columns, mask=inside, other=0.0)
            tl.store(student_row_ptr + columns, scale * (dterm - q * grad_sum), mask=inside)


def divergence_fwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_weights: Tensor | None,
    divergence: int,
    param0: float,
    param1: float,
    student_temperature: float,
    teacher_temperature: float,
    vocab_size: int,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, student_lse, teacher_lse, grad_sum, statistics) of `opd::divergence_fwd`."""
    num_tokens = student_logits.shape[0]
    loss = student_logits.new_empty(num_tokens, dtype=torch.float32)
    grad_sum = torch.empty_like(loss)
    student_lse = student_logits.new_empty(num_tokens, dtype=torch.float64)
    teacher_lse = torch.empty_like(student_lse)
    statistics = loss.new_empty(NUM_STATISTICS, num_tokens if with_statistics else 0)
    block_v, num_warps = tile(vocab_size)
    launch(
        _divergence_fwd_kernel, num_tokens, num_warps,
        student_logits, teacher_logits, token_weights, loss, student_lse, teacher_lse, grad_sum,
        statistics, num_tokens, vocab_size, student_logits.stride(0), teacher_logits.stride(0),
        student_temperature, teacher_temperature, *parameters(param0, param1),
        DIVERGENCE=divergence, HAS_TEMPERATURE=student_temperature != 1 or teacher_temperature != 1,
        HAS_WEIGHTS=token_weights is not None, WITH_STATISTICS=with_statistics, BLOCK_V=block_v,
    )  # fmt: skip
    return loss, student_lse, teacher_lse, grad_sum, statistics


def divergence_bwd(
    grad_loss: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_weights: Tensor | None,
    student_lse: Tensor,
    teacher_lse: Tensor,
    grad_sum: Tensor,
    divergence: int,
    param0: float,
    param1: float,
    student_temperature: float,
    teacher_temperature: float,
    vocab_size: int,
) -> Tensor:
    """grad_student_logits of `opd::divergence_bwd`, zero beyond `vocab_size`."""
    num_tokens, grad_width = student_logits.shape
    grad_student_logits = student_logits.new_empty(num_tokens, grad_width)
    block_v, num_warps = tile(vocab_size)
    launch(
        _divergence_bwd_kernel, num_tokens, num_warps,
        grad_loss.contiguous(), student_logits, teacher_logits, token_weights, student_lse,
        teacher_lse, grad_sum, grad_student_logits, vocab_size, grad_width,
        student_logits.stride(0), teacher_logits.stride(0), grad_student_logits.stride(0),
        student_temperature, teacher_temperature, *parameters(param0, param1),
        DIVERGENCE=divergence, HAS_TEMPERATURE=student_temperature != 1 or teacher_temperature != 1,
        HAS_WEIGHTS=token_weights is not None, BLOCK_V=block_v,
    )  # fmt: skip
    return grad_student_logits


def divergence_fwd_grad_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_weights: Tensor | None,
    divergence: int,
    param0: float,
    param1: float,
    student_temperature: float,
    teacher_temperature: float,
    vocab_size: int,
    with_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, statistics) of `opd::divergence_fwd_grad_`; student_logits becomes the gradient."""
    num_tokens = student_logits.shape[0]
    loss = student_logits.new_empty(num_tokens, dtype=torch.float32)
    statistics = loss.new_empty(NUM_STATISTICS, num_tokens if with_statistics else 0)
    block_v, num_warps = tile(vocab_size)
    launch(
        _divergence_fwd_grad_kernel, num_tokens, num_warps,
        student_logits, teacher_logits, token_weights, loss, statistics, num_tokens, vocab_size,
        student_logits.stride(0), teacher_logits.stride(0), student_temperature,
        teacher_temperature, *parameters(param0, param1), DIVERGENCE=divergence,
        HAS_TEMPERATURE=student_temperature != 1 or teacher_temperature != 1,
        HAS_WEIGHTS=token_weights is not None,
        WITH_STATISTICS=with_statistics, BLOCK_V=block_v,
    )  # fmt: skip
    return loss, statistics
