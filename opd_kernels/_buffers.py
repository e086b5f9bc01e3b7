# SPDX-License-Identifier: Apache-2.0
"""The chunk's buffers; on a CPU their memory is kept for the next call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import _checks, _gemms

# on a CPU: buffers up to this size are kept between calls, and no plan asks for more than this of a
# larger budget
KEPT_BYTES = 256 << 20
# on a GPU a row begins at a multiple of these elements: 16 bytes of the 16-bit dZ that takes the
# place of float32 logits, and of these a sector. Bulk copies, 16-byte loads and the library's GEMMs
# are for aligned rows only
ROW_ALIGNMENT = 8


class _Kept(threading.local):
    """The buffer that this thread's next call may take."""

    buffer: Tensor | None = None


_kept = _Kept()


def row_stride(like: Tensor, columns: int) -> int:
    """Elements from one row of a buffer to the next, on the device of `like`."""
    if not _gemms.on_gpu(like):
        return columns
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


def rows_of(memory: Tensor, num_rows: int, columns: int) -> Tensor:
    """[num_rows, columns] at the front of a buffer, its rows `row_stride` apart."""
    stride = row_stride(memory, columns)
    return memory[: num_rows * stride].view(num_rows, stride)[:, :columns]


def rounded_in(memory: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values [C, V] in this dtype of 16 bits, at the front of a buffer; what is left of it)."""
    rounded = rows_of(memory.view(dtype), *values.shape)
    taken = rounded.shape[0] * row_stride(rounded, rounded.shape[1])
    return rounded.copy_(values), memory[-(-taken // 2) :]


@contextlib.contextmanager
def borrowed_buffers(like: Tensor, shapes: Sequence[tuple[int, int]]) -> Iterator[list[Tensor]]:
    """Memory for `rows_of` each shape, one-dimensional, for as long as the block runs.

    On a CPU their memory is kept for this thread's next call, up to KEPT_BYTES: the system hands
    out pages one fault at a time, which may cost a tenth of a whole loss. `release_workspace` frees
    it.
    """
    real = _checks.real_dtype(like)
    sizes = [num_rows * row_stride(like, columns) for num_rows, columns in shapes]
    total = sum(sizes)
    reusable = (
        like.device.type == "cpu"
        and real == torch.float32
        and total * real.itemsize <= KEPT_BYTES
        # tests fill new memory with NaN to see who reads it unwritten
        and not torch.are_deterministic_algorithms_enabled()
    )
    if not reusable:
        yield [_gemms.new_buffer(like, size) for size in sizes]
        return
    # nobody else finds it until it is given back
    kept, _kept.buffer = _kept.buffer, None
    if kept is None or kept.numel() < total:
        kept = None
        # one of inference mode's could not be written to outside of it
        with torch.inference_mode(False):
            kept = _gemms.new_buffer(like, total)
    try:
        yield list(kept[:total].split(sizes))
    finally:
        _kept.buffer = kept


def release_workspace() -> None:
    """Frees what this thread keeps for its next call on a CPU, at most 256 MiB."""
    _kept.buffer = None
