# SPDX-License-Identifier: Apache-2.0
"""Float32 gradients to 16 bits on a CPU, without both of them in memory at one time.

dW of a 16-bit head is summed up in float32, twice the size of what is returned. While it is rounded
the pages that have been read go back to the system, so that the peak of a training step is the
float32 sum and not one and a half of it.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from . import _pages

# rounded at a time; smaller tensors are not worth the system calls
_ELEMENTS = 1 << 20
_NARROW = (torch.bfloat16, torch.float16)


def is_worth_it(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether `round_and_free` may have these values, of which nobody else is a reader."""
    return (
        values.device.type == "cpu"
        and type(values) is Tensor
        and values.dtype == torch.float32
        and dtype in _NARROW
        and values.numel() > _ELEMENTS
        and values.is_contiguous()
        and values.untyped_storage().nbytes() == values.nbytes
        and not values.is_shared()
        and not values.is_pinned()
    )


def round_and_free(values: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """values * factor in this dtype, rounded once. What `values` holds is lost, page by page.

    Elsewhere than on Linux the values keep their pages and the result is the same.

    Args:
        values: as `is_worth_it` wants them; the only reader is the caller.
        factor: scalar of their dtype; None: 1.
    """
    result = values.new_empty(values.shape, dtype=dtype)
    source, target = values.view(-1), result.view(-1)
    address = values.data_ptr()
    freed = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    for begin in range(0, source.numel(), _ELEMENTS):
        end = min(begin + _ELEMENTS, source.numel())
        if factor is None:
            target[begin:end].copy_(source[begin:end])
        else:
            torch.mul(source[begin:end], factor, out=target[begin:end])
        # whole pages that nothing else lies in
        stop = (address + end * values.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > freed:
            _pages.free(freed, stop - freed)
            freed = stop
    return result
