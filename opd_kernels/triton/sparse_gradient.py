# SPDX-License-Identifier: Apache-2.0
"""The columns of a gradient that some token needs, packed, and what each row sums to elsewhere.

The three launchers have the signatures of the `opd` schemas. A NaN or an infinity is always needed;
rows of weight 0 are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import COUNTS, launch, tile

_LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)
# columns that one program marks, and rows that it has in flight
_MARK_COLUMNS, _MARK_ROWS = 512, 8
_MARK_WARPS = 8


@triton.jit(do_not_specialize=COUNTS)
def _sparse_gradient_mark_kernel(
    grad_ptr, token_weights_ptr, kept_ptr, num_tokens, vocab_size, stride_grad, tolerance,
    HAS_WEIGHTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    lanes = tl.arange(0, BLOCK_T)
    marks = tl.zeros((BLOCK_T, BLOCK_V), tl.int32)
    for begin in range(0, num_tokens, BLOCK_T):
        rows = begin + lanes
        is_read = rows < num_tokens
        weights = tl.full((BLOCK_T,), 1.0, tl.float32)
        if HAS_WEIGHTS:
            weights = tl.abs(tl.load(token_weights_ptr + rows, mask=is_read, other=0.0))
            is_read = is_read & (weights != 0.0)
        # finite, so that an infinite weight does not drop infinities; a NaN stays one
        threshold = tolerance * weights
        threshold = tl.where(threshold > _LARGEST_FLOAT32, _LARGEST_FLOAT32, threshold)
        pointers = grad_ptr + rows.to(tl.int64)[:, None] * stride_grad + columns[None, :]
        mask = is_read[:, None] & (columns < vocab_size)[None, :]
        sizes = tl.abs(tl.load(pointers, mask=mask, other=0.0))
        # not `sizes > threshold`, which a NaN is not
        is_small = sizes <= threshold[:, None]
        marks |= tl.where(is_small | (is_read == 0)[:, None], 0, 1)
    kept = tl.max(marks, 0)
    tl.store(kept_ptr + columns, kept.to(tl.uint8), mask=columns < vocab_size)


@triton.jit(do_not_specialize=COUNTS)
def _sparse_gradient_pack_kernel(
    packed_ptr, grad_ptr, token_weights_ptr, columns_ptr, kept_ptr, dropped_ptr, vocab_size,
    num_columns, stride_grad, HAS_WEIGHTS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = grad_ptr + row * stride_grad
    packed_row_ptr = packed_ptr + row * num_columns
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.abs(tl.load(token_weights_ptr + row))
    lanes = tl.arange(0, BLOCK_V)
    # a row that counts for nothing is not read
    readable = tl.where(weight == 0.0, 0, vocab_size)
    total = tl.zeros((BLOCK_V,), tl.float64)
    for begin in range(0, vocab_size, BLOCK_V):
        columns = begin + lanes
        values = tl.load(row_ptr + columns, mask=columns < readable, other=0.0)
        kept = tl.load(kept_ptr + columns, mask=columns < readable, other=1)
        total += tl.where(kept == 0, tl.abs(values), 0.0).to(tl.float64)
    dropped = tl.sum(total, 0)
    dropped = tl.where(weight == 0.0, 0.0, dropped / tl.where(weight == 0.0, 1.0, weight))
    tl.store(dropped_ptr + row, dropped.to(tl.float32))
    for begin in range(0, num_columns, BLOCK_V):
        positions = begin + lanes
        is_position = positions < num_columns
        columns = tl.load(columns_ptr + positions, mask=is_position, other=0)
        values = tl.load(row_ptr + columns, mask=is_position & (columns < readable), other=0.0)
        tl.store(packed_row_ptr + positions, values, mask=is_position)


@triton.jit
def _sparse_gradient_add_kernel(
    target_ptr, columns_ptr, rows_ptr, width, stride_target, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target_row_ptr = target_ptr + tl.load(columns_ptr + row) * stride_target
    lanes = tl.arange(0, BLOCK_V)
    for begin in range(0, width, BLOCK_V):
        positions = begin + lanes
        is_position = positions < width
        values = tl.load(target_row_ptr + positions, mask=is_position, other=0.0)
        values += tl.load(rows_ptr + row * width + positions, mask=is_position, other=0.0)
        tl.store(target_row_ptr + positions, values, mask=is_position)


def sparse_gradient_mark(
    grad_logits: Tensor, token_weights: Tensor | None, tolerance: float
) -> Tensor:
    """kept [V] of `opd::sparse_gradient_mark`."""
    num_tokens, vocab_size = grad_logits.shape
    kept = grad_logits.new_empty(vocab_size, dtype=torch.uint8)
    launch(
        _sparse_gradient_mark_kernel, triton.cdiv(vocab_size, _MARK_COLUMNS), _MARK_WARPS,
        grad_logits, grad_logits if token_weights is None else token_weights, kept, num_tokens,
        vocab_size, grad_logits.stride(0), tolerance,
        HAS_WEIGHTS=token_weights is not None, BLOCK_T=_MARK_ROWS, BLOCK_V=_MARK_COLUMNS,
    )  # fmt: skip
    return kept


def sparse_gradient_pack_(
    packed: Tensor,
    grad_logits: Tensor,
    token_weights: Tensor | None,
    columns: Tensor,
    kept: Tensor,
) -> Tensor:
    """dropped [T] of `opd::sparse_gradient_pack_`."""
    num_tokens, vocab_size = grad_logits.shape
    dropped = grad_logits.new_empty(num_tokens)
    block_v, num_warps = tile(vocab_size)
    launch(
        _sparse_gradient_pack_kernel, num_tokens, num_warps,
        packed, grad_logits, grad_logits if token_weights is None else token_weights, columns, kept,
        dropped, vocab_size, columns.shape[0], grad_logits.stride(0),
        HAS_WEIGHTS=token_weights is not None, BLOCK_V=block_v,
    )  # fmt: skip
    return dropped


def sparse_gradient_add_(target: Tensor, columns: Tensor, rows: Tensor) -> None:
    """`opd::sparse_gradient_add_`: no column repeats, so that no program meets another."""
    block_v, num_warps = tile(target.shape[1])
    launch(
        _sparse_gradient_add_kernel, columns.shape[0], num_warps,
        target, columns, rows, target.shape[1], target.stride(0), BLOCK_V=block_v,
    )  # fmt: skip
