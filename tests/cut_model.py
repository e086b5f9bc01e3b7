# SPDX-License-Identifier: Apache-2.0
"""Seconds that a cut takes on an H200, by FLOPs and bytes: a model, not a measurement.

The assumptions are those of the study behind the plan: 745 TFLOP/s in GEMMs of whole tiles of
128 x 256 on 132 multiprocessors, 4.3 TB/s of copies, 92 % of that in row kernels, 4 us a launch. A
GEMM takes what its products or its bytes take, whichever is longer.
"""

from __future__ import annotations

from opd_kernels._plan import Plan

FLOPS, BYTES_PER_SECOND, ROWS_SHARE, LAUNCH = 745e12, 4.3e12, 0.92, 4e-6
MULTIPROCESSORS, TILE_ROWS, TILE_COLUMNS = 132, 128, 256
LOGIT, OPERAND = 4, 2


def gemm(rows: int, columns: int, depth: int, moved: int, splits: int = 1) -> float:
    """`moved`: bytes read and written; `splits`: slices of the depth that run side by side."""
    tiles = -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)
    waves = -(-tiles * splits // MULTIPROCESSORS)
    flops = 2 * TILE_ROWS * TILE_COLUMNS * depth / splits * waves * MULTIPROCESSORS
    partial = 2 * LOGIT * rows * columns * splits if splits > 1 else 0
    return max(flops / FLOPS, moved / BYTES_PER_SECOND) + partial / BYTES_PER_SECOND + LAUNCH


def logits(tokens: int, columns: int, width: int) -> float:
    moved = OPERAND * (columns + tokens) * width + LOGIT * tokens * columns
    return gemm(tokens, columns, width, moved)


def rows(tokens: int, columns: int, bytes_per_logit: int) -> float:
    return tokens * columns * bytes_per_logit / (BYTES_PER_SECOND * ROWS_SHARE) + LAUNCH


def backward(plan: Plan, tokens: int, columns: int, width: int, is_frozen: bool) -> float:
    """dX and dW of a chunk and a slice."""
    dz, head = OPERAND * tokens * columns, OPERAND * columns * width
    total = gemm(tokens, width, columns, dz + head, plan.grad_hidden_splits)
    if not is_frozen:
        # the float32 sum is read and written
        moved = dz + 2 * LOGIT * columns * width
        total += gemm(columns, width, tokens, moved)
    return total


def seconds(
    plan: Plan, width: int, other: int, *, passes: int = 2, is_frozen: bool = False
) -> float:
    """Of a student and a teacher; `passes` of path B come before that for the gradient."""
    total = 0.0
    for begin, end in plan.chunks():
        tokens = end - begin
        for columns in (part.stop - part.start for part in plan.slices()):
            if plan.whole_rows:
                total += logits(tokens, columns, width)
                for first, last in plan.parts(tokens):
                    total += logits(last - first, columns, other)
                    total += rows(last - first, columns, 2 * LOGIT + OPERAND)
            else:
                formed = logits(tokens, columns, width) + logits(tokens, columns, other)
                read = rows(tokens, columns, 2 * LOGIT)
                total += passes * (formed + read) + formed + rows(tokens, columns, 10)
                # dX of slices is added up
                total += 3 * LOGIT * tokens * width / BYTES_PER_SECOND + LAUNCH
            total += backward(plan, tokens, columns, width, is_frozen)
    return total
