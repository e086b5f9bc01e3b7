# SPDX-License-Identifier: Apache-2.0
"""dX and dW on the columns of dZ that some token of the chunk needs; what is dropped is counted.

A column is kept when |dZ[t, v]| > tolerance |w[t]| for any token t, w the token weights that dZ
carries. With g[t, v] = dZ[t, v] / w[t] and dropped[t] = sum over the other v of |g[t, v]|:

    norm(dX[t] - exact) <= |w[t]| dropped[t] max_v norm(W[v])
    sum_v norm(dW[v] - exact) <= sum_t |w[t]| dropped[t] norm(X[t])

in any norm, up to the rounding of the GEMMs; docs/numerics.md has the proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _gemms
from ._registration import register
from .gemm import gemm

# beyond this share of the columns, packing them costs what the shorter GEMMs save
LARGEST_SHARE = 0.75
# as many rows of the head at least, or a GEMM would cost what gathering them costs
_FEWEST_ROWS = 16
_ALIGNMENT = 16


def _mark_fake(grad_logits, token_weights, tolerance):
    return grad_logits.new_empty(grad_logits.shape[1], dtype=torch.uint8)


def _pack_fake(packed, grad_logits, token_weights, columns, kept):
    return grad_logits.new_empty(grad_logits.shape[0])


def _add_fake(target, columns, rows):
    return None


def _triton_mark(*arguments):
    from .triton import sparse_gradient as kernels

    return kernels.sparse_gradient_mark(*arguments)


def _triton_pack_(*arguments):
    from .triton import sparse_gradient as kernels

    return kernels.sparse_gradient_pack_(*arguments)


def _triton_add_(*arguments):
    from .triton import sparse_gradient as kernels

    return kernels.sparse_gradient_add_(*arguments)


register("sparse_gradient_mark", fake=_mark_fake, triton=_triton_mark)
register("sparse_gradient_pack_", fake=_pack_fake, triton=_triton_pack_)
register("sparse_gradient_add_", fake=_add_fake, triton=_triton_add_)


class Packed(NamedTuple):
    """dZ [C, K] of the columns that count, their ids [K], and memory for the GEMMs' operands."""

    grad_logits: Tensor
    columns: Tensor
    spare: Tensor
    # rows of the head, or of its gradient, whose operands fit into `spare`
    rows_at_a_time: int
    # what the GEMMs take of dZ
    dtype: torch.dtype


def pack(
    rows,
    grad_logits: Tensor,
    token_weights: Tensor | None,
    tolerance: float,
    buffer: Tensor,
    head: Tensor,
    head_slice_rows: int,
    largest_share: float = LARGEST_SHARE,
) -> tuple[Packed | None, Tensor]:
    """(the columns of dZ [C, V] that count, L1 dropped per token before its weight [C]).

    None where so many count that the dense GEMMs are as cheap: nothing is dropped then.

    Args:
        rows: namespace of the row kernels.
        grad_logits: dZ, with its token weights in it.
        token_weights: [C]; None for ones. Rows of weight 0 need no column.
        tolerance: of |dZ| / |weight|.
        buffer: [C, V] of the dtype of dZ, overwritten: packing, and the GEMMs after it, take no
            memory of their own but for the marks and ids of the columns.
        head: [V, D], the rows that dZ's columns belong to.
        head_slice_rows: how many of them may be widened at a time, where they must be.
        largest_share: of the columns that are packed.
    """
    num_tokens, vocab_size = grad_logits.shape
    kept = rows.sparse_gradient_mark(grad_logits, token_weights, tolerance)
    # a wait for the device: the list has as many entries as the data say
    columns = torch.nonzero(kept).squeeze(1)
    flat, size = buffer.view(-1), num_tokens * columns.shape[0]
    # GEMMs like aligned operands
    spare = flat[_aligned(size) :]
    dtype = _dtype_of_operand(grad_logits, head)
    row, more = head.shape[1], 0
    if dtype != grad_logits.dtype:
        # 16 bits of dZ beside each row, and what aligning them takes
        row += -(-num_tokens // 2)
        more = _ALIGNMENT * (num_tokens // 2 + 2)
    rows_at_a_time = max(0, spare.shape[0] - more) // row
    if _gemms.widens(head):
        rows_at_a_time = min(rows_at_a_time, head_slice_rows)
    fewest = min(_FEWEST_ROWS, columns.shape[0])
    if columns.shape[0] > largest_share * vocab_size or rows_at_a_time < fewest:
        return None, grad_logits.new_zeros(num_tokens)
    packed = flat[:size].view(num_tokens, columns.shape[0])
    dropped = rows.sparse_gradient_pack_(packed, grad_logits, token_weights, columns, kept)
    return Packed(packed, columns, spare, max(1, rows_at_a_time), dtype), dropped


def _dtype_of_operand(grad_logits: Tensor, head: Tensor) -> torch.dtype:
    """What dZ is rounded to for a product with the head: the width that the head multiplies in."""
    if _gemms.is_own(grad_logits) or _gemms.grad_dtype(head) == _gemms.AS_LOGITS:
        return grad_logits.dtype
    return head.dtype


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


class _Piece(NamedTuple):
    """Some of the columns: dZ [C, k] as the GEMMs take it, ids [k], memory for k rows."""

    grad_logits: Tensor
    columns: Tensor
    rows: Tensor


def _pieces(packed: Packed, width: int) -> Iterator[_Piece]:
    """All that the GEMMs read and write lies in the spare memory: nothing is allocated."""
    num_tokens, num_columns = packed.grad_logits.shape
    for begin in range(0, num_columns, packed.rows_at_a_time):
        columns = packed.columns[begin : begin + packed.rows_at_a_time]
        count = columns.shape[0]
        gradient = packed.grad_logits[:, begin : begin + count]
        rows, rest = packed.spare[: count * width], packed.spare[_aligned(count * width) :]
        if packed.dtype != gradient.dtype:
            # rows that begin aligned
            stride = _aligned(count)
            memory = rest.view(packed.dtype)[: num_tokens * stride].view(num_tokens, stride)
            gradient = memory[:, :count].copy_(gradient)
        yield _Piece(gradient, columns, rows)


def grad_hidden(packed: Packed, head: Tensor) -> Tensor:
    """dX [C, D] in float32 (float64), from the columns that count."""
    real = packed.grad_logits.dtype
    result = packed.grad_logits.new_zeros(packed.grad_logits.shape[0], head.shape[1])
    for piece in _pieces(packed, head.shape[1]):
        size = piece.columns.shape[0], head.shape[1]
        if _gemms.widens(head):
            weight = piece.rows.view(size).copy_(head[piece.columns])
        else:
            memory = piece.rows if head.dtype == real else piece.rows.view(head.dtype)
            memory = memory[: math.prod(size)].view(size)
            weight = torch.index_select(head, 0, piece.columns, out=memory)
        gemm(result, piece.grad_logits, weight, accumulate=True)
    return result


def add_grad_weight(
    rows, target: Tensor, packed: Packed, hidden: Tensor, factor: float = 1.0
) -> None:
    """target [V, D] += factor * dW, on the rows whose columns count."""
    for piece in _pieces(packed, target.shape[1]):
        out = piece.rows.view(-1, target.shape[1])
        gemm(out, piece.grad_logits.t(), hidden, factor=factor)
        rows.sparse_gradient_add_(target, piece.columns, out)
