# SPDX-License-Identifier: Apache-2.0
"""Arrays of numbers off the wire: nested or flat JSON lists, or base64 of little-endian bytes."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import torch
from torch import Tensor

from opd.clients.protocol import BadReply
from opd.wire import DTYPES

_DTYPES = DTYPES | {"int32": torch.int32}


def read_base64(text: Any, dtype: str, shape: tuple[int, ...], what: str) -> Tensor:
    """The tensor in a base64 text.

    Raises:
        BadReply: no base64, an unknown dtype, another number of bytes.
    """
    if dtype not in _DTYPES:
        raise BadReply(f"{what}: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r:.50}")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadReply(f"{what}: is not base64, {error}") from None
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(data) != size:
        raise BadReply(
            f"{what}: must have {size} bytes, for {dtype} {list(shape)}, got {len(data)}"
        )
    if not data:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).reshape(shape)


def read_numbers(values: Any, shape: tuple[int, ...], what: str) -> Tensor:
    """The float64 tensor in a flat JSON list; ids below 2^53 are exact in it.

    Raises:
        BadReply: no list of as many numbers.
    """
    if not isinstance(values, list) or len(values) != math.prod(shape):
        got = f"{len(values)} items" if isinstance(values, list) else type(values).__name__
        raise BadReply(f"{what}: must be a list of {math.prod(shape)} numbers, got {got}")
    if not all(type(value) in (int, float) for value in values):
        raise BadReply(f"{what}: has something that is no number")
    try:
        return torch.tensor(values, dtype=torch.float64).reshape(shape)
    except (OverflowError, ValueError, RuntimeError):
        raise BadReply(f"{what}: has a number that is no float") from None


def read_shape(value: Any, what: str, *, rank: int) -> tuple[int, ...]:
    """A shape: so many ints, none negative.

    Raises:
        BadReply: something else.
    """
    is_shape = isinstance(value, list) and len(value) == rank
    if not is_shape or not all(type(size) is int and 0 <= size < 1 << 31 for size in value):
        raise BadReply(f"{what}: must be {rank} sizes, got {value!r:.80}")
    return tuple(value)


def pad_rows(rows: list[tuple[list[int], list[float]]], width: int) -> tuple[Tensor, Tensor]:
    """[C, n] int64 and float64 from rows of different lengths, with -1 and -inf behind them."""
    width = max([width, *(len(ids) for ids, _ in rows)])
    ids = torch.full((len(rows), width), -1, dtype=torch.int64)
    logprobs = torch.full((len(rows), width), -torch.inf, dtype=torch.float64)
    for place, (row_ids, values) in enumerate(rows):
        ids[place, : len(row_ids)] = torch.tensor(row_ids, dtype=torch.int64)
        logprobs[place, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return ids, logprobs
