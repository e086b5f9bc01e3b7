# SPDX-License-Identifier: Apache-2.0
"""What the system is told about the pages of a CPU tensor; on Linux, and elsewhere nothing."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_DONTNEED, _HUGEPAGE = 4, 14
_HUGE_BYTES = 2 << 20


def free(address: int, size: int) -> None:
    """Private memory of whole pages becomes zeros that take no room."""
    _madvise()(address, size, _DONTNEED)


def ask_for_huge(values: Tensor) -> Tensor:
    """The tensor, whose memory nobody has touched yet, in pages of 2 MiB where the system has them.

    dW is new in every step: 4 KiB at a time the system takes longer to hand it out than a tenth of
    the GEMM that fills it.
    """
    if values.device.type != "cpu":
        return values
    address = values.data_ptr()
    begin = -(-address // _HUGE_BYTES) * _HUGE_BYTES
    end = (address + values.nbytes) // _HUGE_BYTES * _HUGE_BYTES
    if end > begin:
        _madvise()(begin, end - begin, _HUGEPAGE)
    return values


@functools.cache
def _madvise() -> Callable[[int, int, int], object]:
    if not sys.platform.startswith("linux"):
        return lambda address, size, advice: None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # where it is refused (locked memory, no huge pages) nothing changes: no harm
    return function
