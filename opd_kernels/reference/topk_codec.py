# SPDX-License-Identifier: Apache-2.0
"""Top-k laws as rows of bytes, with Python's integers and fractions: a row is one long integer."""

from __future__ import annotations

import itertools
import math
import struct
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

_HEADER_BYTES = 12
_REFUSED = 0xFFFF
_LARGEST_LOGPROB = 2.0**-10
_LARGEST_FLOAT32 = 3.4028234663852886e38
_SMALLEST_NORMAL = 0x0080
_INF = math.inf

# what is wrong with a row: opd_codec_status_t
OK, NAN, POSITIVE, ID, PADDING, ORDER, DUPLICATE = range(7)
ROW_REFUSED, ROW_HEADER, ROW_IDS, ROW_CODES, ROW_PADDING = range(7, 12)


class TopkCodes(NamedTuple):
    """codes [T, row bytes] uint8, and what they are codes of."""

    codes: Tensor
    num_topk: int
    vocab_size: int
    bits: int


class TopkLaws(NamedTuple):
    """ids [T, K] int32, logprobs [T, K] and tail_logprob [T] float32, nats; status [T] int32."""

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    status: Tensor


class _Row:
    """Where the fields of a row are, in bits, and what its codes mean."""

    def __init__(self, num_topk: int, vocab_size: int, bits: int) -> None:
        self.num_topk, self.vocab_size, self.bits = num_topk, vocab_size, bits
        self.low_bits = (vocab_size // num_topk).bit_length() - 1
        self.high_bits = num_topk + ((vocab_size - 1) >> self.low_bits)
        self.high_at = 8 * _HEADER_BYTES
        self.low_at = self.high_at + _whole_bytes(self.high_bits)
        self.codes_at = self.low_at + _whole_bytes(num_topk * self.low_bits)
        end = self.codes_at + _whole_bytes(num_topk * bits)
        self.num_bytes = -(-end // 32) * 4
        self.absent = (1 << bits) - 1
        self.bend = 1 << (bits - 2)

    def units(self, code: int) -> int:
        """Depth of a code in units of the scale."""
        return code * (code + self.bend)

    def scale_bits(self, depth: float) -> int:
        """The smallest normal bfloat16, as its bits, whose last finite code is so deep."""
        if depth == 0:
            return 0
        low, high = _SMALLEST_NORMAL, 0x7F7F
        while low < high:
            middle = (low + high) // 2
            reaches = Fraction(_bfloat16(middle)) * self.units(self.absent - 1) >= Fraction(depth)
            low, high = (low, middle) if reaches else (middle + 1, high)
        return low

    def code(self, scale: float, depth: float) -> int:
        """The code with the nearest depth, the shallower of two."""
        if scale == 0:
            return 0
        wanted = Fraction(depth) / Fraction(scale)
        low, high = 0, self.absent - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.units(middle) <= wanted else (low, middle - 1)
        if low == self.absent - 1:
            return low
        return low + (2 * wanted > self.units(low) + self.units(low + 1))

    def logprob(self, top: float, scale: float, code: int) -> float:
        """What a code means."""
        exact = Fraction(top) - Fraction(scale) * self.units(code)
        # float64 first: the rounding that a kernel makes
        return _float32(max(float(exact), -_LARGEST_FLOAT32))


def encode_topk(
    ids: Tensor,
    logprobs: Tensor,
    *,
    vocab_size: int,
    tail_logprob: Tensor | None = None,
    bits: int = 10,
) -> TopkCodes:
    """Rows of bytes for laws [T, K].

    depth_k = logprobs[0] - logprobs[k] is stored as the code c whose scale c (c + 2^(bits - 2)) is
    nearest, the ids as Elias-Fano has it.

    Args:
        ids: [T, K] integers, best first; -1 is none.
        logprobs: [T, K], nats.
        vocab_size: V.
        tail_logprob: [T], nats. None: log(1 - sum of the probabilities).
        bits: of a code.

    Returns:
        TopkCodes.

    Raises:
        ValueError: a row that is no law.
    """
    num_topk = ids.shape[1]
    row = _Row(num_topk, vocab_size, bits)
    tails = tail_of(ids, logprobs, vocab_size) if tail_logprob is None else tail_logprob.float()
    encoded = []
    for one_ids, one_logprobs, tail in zip(
        ids.tolist(), logprobs.float().tolist(), tails.tolist(), strict=True
    ):
        status = _status(one_ids, one_logprobs, tail, vocab_size)
        if status != OK:
            raise ValueError(f"encode_topk: row {len(encoded)} has status {status}.")
        encoded.append(_encode(row, one_ids, one_logprobs, tail))
    flat = torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)
    return TopkCodes(flat.reshape(ids.shape[0], row.num_bytes), num_topk, vocab_size, bits)


def tail_of(ids: Tensor, logprobs: Tensor, vocab_size: int) -> Tensor:
    """log(1 - sum_k exp logprobs_k) of each row.

    Where the sum is 1 or rounds to more: log of the dtype's eps, or -inf if the ids are all there
    are.
    """
    tails = []
    unit = math.log(torch.finfo(logprobs.dtype).eps)
    for row_ids, row in zip(ids.tolist(), logprobs.double().tolist(), strict=True):
        mass = math.fsum(math.exp(value) for value in row)
        rest = math.log1p(-mass) if mass < 1 else unit
        tails.append(-_INF if sum(i >= 0 for i in row_ids) == vocab_size else rest)
    return torch.tensor(tails, dtype=torch.float32)


def decode_topk(codes: TopkCodes) -> TopkLaws:
    """The laws [T, K] in rows of bytes, best first, equal ones by id.

    Args:
        codes: as encode_topk gives them; any bytes.

    Returns:
        TopkLaws. Where status is not 0, the ids are -1 and the log-probs NaN.
    """
    row = _Row(codes.num_topk, codes.vocab_size, codes.bits)
    laws = [_decode(row, bytes(values)) for values in codes.codes.tolist()]
    shape = (len(laws), codes.num_topk)
    return TopkLaws(
        torch.tensor([law[0] for law in laws], dtype=torch.int32).reshape(shape),
        torch.tensor([law[1] for law in laws], dtype=torch.float32).reshape(shape),
        torch.tensor([law[2] for law in laws], dtype=torch.float32),
        torch.tensor([law[3] for law in laws], dtype=torch.int32),
    )


def _encode(row: _Row, ids: list[int], logprobs: list[float], tail: float) -> bytes:
    entries = [(i, logprob) for i, logprob in zip(ids, logprobs, strict=True) if i != -1]
    finite = [logprob for _, logprob in entries if logprob > -_INF]
    top = entries[0][1] if entries else -_INF
    scale_bits = row.scale_bits(finite[0] - finite[-1]) if finite else 0
    scale = _bfloat16(scale_bits)
    number = len(entries) | scale_bits << 16
    number |= _float32_bits(top) << 32 | _float32_bits(tail) << 64
    for position, (one, logprob) in enumerate(sorted(entries)):
        code = row.code(scale, top - logprob) if logprob > -_INF else row.absent
        number |= 1 << (row.high_at + (one >> row.low_bits) + position)
        number |= (one & ((1 << row.low_bits) - 1)) << (row.low_at + position * row.low_bits)
        number |= code << (row.codes_at + position * row.bits)
    return number.to_bytes(row.num_bytes, "little")


def _decode(row: _Row, data: bytes) -> tuple[list[int], list[float], float, int]:
    number = int.from_bytes(data, "little")

    def field(at: int, width: int) -> int:
        return number >> at & ((1 << width) - 1)

    def refuse(status: int) -> tuple[list[int], list[float], float, int]:
        return [-1] * row.num_topk, [math.nan] * row.num_topk, math.nan, status

    count, scale_bits = field(0, 16), field(16, 16)
    top, tail = _float32_of(field(32, 32)), _float32_of(field(64, 32))
    if count == _REFUSED:
        return refuse(ROW_REFUSED)
    is_scale = scale_bits == 0 or _SMALLEST_NORMAL <= scale_bits <= 0x7F7F
    is_empty = top == -_INF
    if (
        count > row.num_topk
        or not top <= _LARGEST_LOGPROB
        or not tail <= _LARGEST_LOGPROB
        or not is_scale
        or (is_empty and scale_bits != 0)
        or (count == 0 and not is_empty)
    ):
        return refuse(ROW_HEADER)
    places = [i for i in range(row.high_bits) if field(row.high_at + i, 1)]
    ids = [
        (place - i) << row.low_bits | field(row.low_at + i * row.low_bits, row.low_bits)
        for i, place in enumerate(places[: count + 1])
        if i < row.num_topk
    ]
    ascends = all(a < b for a, b in itertools.pairwise(ids))
    if len(places) != count or not ascends or (ids and ids[-1] >= row.vocab_size):
        return refuse(ROW_IDS)
    codes = [field(row.codes_at + i * row.bits, row.bits) for i in range(count)]
    if is_empty:
        allowed = {row.absent}
    else:
        allowed = {0, row.absent} if scale_bits == 0 else range(row.absent + 1)
    if any(code not in allowed for code in codes) or (not is_empty and 0 not in codes):
        return refuse(ROW_CODES)
    gaps = (
        (row.high_at + row.high_bits, row.low_at),
        (row.low_at + count * row.low_bits, row.codes_at),
        (row.codes_at + count * row.bits, 8 * row.num_bytes),
    )
    if any(field(begin, end - begin) for begin, end in gaps):
        return refuse(ROW_PADDING)
    scale = _bfloat16(scale_bits)
    missing = row.num_topk - count
    best_first = sorted(zip(codes, ids, strict=True))
    logprobs = [
        -_INF if code == row.absent else row.logprob(top, scale, code) for code, _ in best_first
    ]
    return [i for _, i in best_first] + [-1] * missing, logprobs + [-_INF] * missing, tail, OK


def _status(ids: list[int], logprobs: list[float], tail: float, vocab_size: int) -> int:
    """The smallest number of what is wrong."""
    found = set()
    for k, (one, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        if math.isnan(logprob):
            found.add(NAN)
        if logprob > _LARGEST_LOGPROB:
            found.add(POSITIVE)
        if not -1 <= one < vocab_size:
            found.add(ID)
        if one == -1 and logprob > -_INF:
            found.add(PADDING)
        if k > 0 and one != -1 and ids[k - 1] == -1:
            found.add(PADDING)
        if k > 0 and logprob > logprobs[k - 1]:
            found.add(ORDER)
    real = [one for one in ids if one >= 0]
    if len(set(real)) < len(real):
        found.add(DUPLICATE)
    if math.isnan(tail):
        found.add(NAN)
    if tail > _LARGEST_LOGPROB:
        found.add(POSITIVE)
    return min(found, default=OK)


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8) * 8


def _float32_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _float32_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _float32(value: float) -> float:
    return _float32_of(_float32_bits(value))


def _bfloat16(bits: int) -> float:
    return _float32_of(bits << 16)
