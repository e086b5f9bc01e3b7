# SPDX-License-Identifier: Apache-2.0
"""Calls csrc/core/nearest_tokens.cpp: the token with the fewest byte edits from a byte string."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from . import _library
from .errors import OpdError


class _ByteStrings(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_char_p),
        ("offsets", ctypes.POINTER(ctypes.c_int64)),
        ("num_strings", ctypes.c_int64),
    )

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> _ByteStrings:
        ends = list(accumulate(map(len, strings), initial=0))
        return cls(b"".join(strings), (ctypes.c_int64 * len(ends))(*ends), len(strings))


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("queries", _ByteStrings),
        ("vocabulary", _ByteStrings),
        ("is_special", ctypes.c_char_p),
        ("nearest", ctypes.POINTER(ctypes.c_int64)),
        ("distances", ctypes.POINTER(ctypes.c_int64)),
        ("parallel_for", ctypes.c_void_p),
    )


@cache
def _entry_points() -> tuple[ctypes._CFuncPtr, ctypes._CFuncPtr]:
    library = ctypes.CDLL(str(_library.PATH))
    library.opd_nearest_tokens_cpu.argtypes = [ctypes.POINTER(_Arguments)]
    library.opd_last_error.restype = ctypes.c_char_p
    return library.opd_nearest_tokens_cpu, library.opd_last_error


def nearest_tokens(
    queries: Sequence[bytes], vocabulary: Sequence[bytes], is_special: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(ids, distances): of the vocabulary's tokens that are not special, the nearest to each query.

    The lowest id of equally near ones; -1, -1 for an empty query or if no token counts. Other
    threads of Python run meanwhile, and the work is divided among those of OpenMP.
    """
    run, last_error = _entry_points()
    nearest, distances = ((ctypes.c_int64 * len(queries))() for _ in range(2))
    arguments = _Arguments(
        ctypes.sizeof(_Arguments),
        _ByteStrings.of(queries),
        _ByteStrings.of(vocabulary),
        bytes(bool(value) for value in is_special),
        nearest,
        distances,
        None,
    )
    if run(ctypes.byref(arguments)):
        raise OpdError(last_error().decode())
    return list(nearest), list(distances)
