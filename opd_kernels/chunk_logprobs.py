# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of chunks of tokens, and where their tokens are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .segment_scan import segment_reduce

_OP = "chunk_logprobs"


class ChunkIndex(NamedTuple):
    """Where the tokens of each chunk are, [C] int64 each.

    Attributes:
        length: tokens, 0 for an empty chunk.
        first, last: the rows of its first and last token; of an empty chunk 0, which is a row of
            something else.
    """

    length: Tensor
    first: Tensor
    last: Tensor


def chunk_logprobs(
    token_logprobs: Tensor, offsets: Tensor, *, backend: str | None = None
) -> Tensor:
    """Log-probability of each chunk of tokens, given all before it: the chain rule's sum.

    out[c] = sum_{offsets[c] <= t < offsets[c + 1]} token_logprobs[t].

    Args:
        token_logprobs: [T] float32 | float64 | bfloat16 | float16, nats. Differentiable.
        offsets: [C + 1] int64 or int32, from 0 to T, never decreasing: one side of an
            `align_tokens`. Checked on CPU; on a GPU it is the caller's contract.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

    Returns:
        [C] float32 (float64 for float64), nats; 0 for an empty chunk. Linear, with gradients of any
        order.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, offsets that are not (on CPU).
        UnsupportedBackendError.

    Source: approximate likelihood matching, arXiv:2503.20083.
    """
    _checks.tensor(_OP, "token_logprobs", token_logprobs, 1)
    _check_offsets(_OP, offsets)
    if token_logprobs.dtype not in _checks.FLOATS:
        raise TypeError(
            f"{_OP}: token_logprobs must be a floating tensor, got {token_logprobs.dtype}."
        )
    if offsets.device != token_logprobs.device:
        raise ValueError(
            f"{_OP}: offsets must be on {token_logprobs.device}, got {offsets.device}."
        )
    if _is_read(offsets) and int(offsets[-1]) != token_logprobs.shape[0]:
        raise ValueError(
            f"{_OP}: offsets must end at {token_logprobs.shape[0]}, the number of token_logprobs, "
            f"got {int(offsets[-1])}."
        )
    return segment_reduce(token_logprobs, offsets, backend=backend)


def chunk_index(offsets: Tensor) -> ChunkIndex:
    """Length, first and last row of every chunk, on the device of the offsets.

    Args:
        offsets: [C + 1] int64 or int32, as for `chunk_logprobs`.

    Returns:
        ChunkIndex.

    Raises:
        TypeError, ValueError: not a tensor of one dimension with at least one integer; values that
            do not start at 0 or decrease (on CPU).
    """
    _check_offsets("chunk_index", offsets)
    begin, end = offsets[:-1].to(torch.int64), offsets[1:].to(torch.int64)
    length = end - begin
    is_empty = length == 0
    return ChunkIndex(length, begin.masked_fill(is_empty, 0), (end - 1).masked_fill(is_empty, 0))


def _is_read(offsets: Tensor) -> bool:
    """Whether the values may be looked at: elsewhere it would wait, or break a trace."""
    return offsets.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_offsets(op: str, offsets: Tensor) -> None:
    _checks.tensor(op, "offsets", offsets, 1)
    if offsets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: offsets must be int64 or int32, got {offsets.dtype}.")
    if offsets.shape[0] == 0:
        raise ValueError(f"{op}: offsets must hold at least one value (0), got none.")
    if not _is_read(offsets):
        return
    falls = offsets.diff(prepend=offsets.new_zeros(1)) < 0
    if int(offsets[0]) != 0 or bool(falls.any()):
        place = int(falls.int().argmax())
        raise ValueError(
            f"{op}: offsets must start at 0 and never decrease, got {int(offsets[place])} at "
            f"position {place}."
        )
