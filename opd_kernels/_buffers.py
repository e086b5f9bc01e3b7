# SPDX-License-Identifier: Apache-2.0
"""The chunk's buffers; on a CPU their memory is kept for the next call."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import _checks, _gemms

# on a CPU: buffers up to this size are kept between calls, and no plan asks for more than this of a
# larger budget
KEPT_BYTES = 256 << 20


class _Kept(threading.local):
    """The buffer that this thread's next call may take."""

    buffer: Tensor | None = None


_kept = _Kept()


@contextlib.contextmanager
def borrowed_buffers(like: Tensor, shapes: Sequence[tuple[int, int]]) -> Iterator[list[Tensor]]:
    """A `_gemms.new_buffer` of each shape, for as long as the block runs.

    On a CPU their memory is kept for this thread's next call, up to KEPT_BYTES: the system hands
    out pages one fault at a time, which may cost a tenth of a whole loss. `release_workspace` frees
    it.
    """
    real, sizes = _checks.real_dtype(like), [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    reusable = (
        like.device.type == "cpu"
        and real == torch.float32
        and total * real.itemsize <= KEPT_BYTES
        # tests fill new memory with NaN to see who reads it unwritten
        and not torch.are_deterministic_algorithms_enabled()
    )
    if not reusable:
        yield [_gemms.new_buffer(like, *shape) for shape in shapes]
        return
    # nobody else finds it until it is given back
    kept, _kept.buffer = _kept.buffer, None
    if kept is None or kept.numel() < total:
        kept = None
        # one of inference mode's could not be written to outside of it
        with torch.inference_mode(False):
            kept = _gemms.new_buffer(like, total)
    try:
        parts = kept[:total].split(sizes)
        yield [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    finally:
        _kept.buffer = kept


def release_workspace() -> None:
    """Frees what this thread keeps for its next call on a CPU, at most 256 MiB."""
    _kept.buffer = None
