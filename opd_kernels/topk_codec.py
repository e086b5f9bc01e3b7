# SPDX-License-Identifier: Apache-2.0
"""Top-k laws as rows of bytes of one size: what a teacher said, small enough to keep.

A row of K = 64 entries of a vocabulary of 151,936 has 200 bytes, one of 128 has 368; with bits=8
they have 184 and 336. Ids and the tail are exact; docs/topk_codec.md has the bytes and the errors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _cells, _checks, _dispatch, reference
from ._registration import register

_OP = "topk_codec"
MAX_TOPK = 4096
_MAX_VOCAB = 1 << 31
_MIN_BITS, _MAX_BITS = 4, 16
_DEFAULT_BITS = 10
_HEADER_BYTES = 12

# words for opd_codec_status_t
_WRONG = {
    1: "a log-prob is NaN",
    2: "a log-prob is above 0: are these logits?",
    3: "an id is neither -1 nor in the vocabulary",
    4: "an id of -1 has a log-prob other than -inf, or an entry after it",
    5: "log-probs are not best first",
    6: "an id is there twice",
    7: "encode_topk has refused the row",
    8: "count, scale, largest log-prob or tail can't be",
    9: "ids don't ascend inside the vocabulary, or are not as many as counted",
    10: "a code that its scale doesn't have, or no largest entry",
    11: "bits that must be 0 are not",
}


class TopkCodes(NamedTuple):
    """codes [T, row bytes] uint8, and what they are codes of: num_topk, vocab_size, bits.

    Rows are independent and all of one size, so that any slice of `codes` is a TopkCodes too:
    `codes._replace(codes=codes.codes[10:20])`.
    """

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


def encode_topk(
    ids: Tensor,
    logprobs: Tensor,
    *,
    vocab_size: int,
    tail_logprob: Tensor | None = None,
    bits: int = _DEFAULT_BITS,
    backend: str | None = None,
) -> TopkCodes:
    """Laws that are known at their K best entries, as rows of bytes.

    With c_k the code of entry k and d_k = logprobs[0] - logprobs[k] its depth, decoding gives
    logprobs[0] - s c_k (c_k + b), b = 2^(bits - 2), the nearest there is to logprobs[k]:

        error_k <= (sqrt((b s)^2 + 4 d_k s) + s) / 2,
        s <= 1.008 range / (C (C + b)),  C = 2^bits - 2

    and half a unit in the last place of float32. The best entry is exact, steps are up to nine
    times as fine at the top as at the bottom. Ids and the tail are exact.

    Args:
        ids: [T, K] int32 or int64, best first, K in [1, 4096]; -1 is none, and stands behind the
            rest.
        logprobs: [T, K] floating, nats, rounded to float32; never rising along a row. -inf is kept.
        vocab_size: V, up to 2^31: ids are in [0, V).
        tail_logprob: [T] floating, nats: the log of the mass outside the K entries, -inf for none.
            None: log(1 - sum_k exp logprobs_k), in float64.
        bits: of each log-prob, 4 to 16.
        backend: "cpu" | "cuda" | "reference"; None picks one.

    Returns:
        TopkCodes, 12 bytes plus about (2 + log2(V / K) + bits) / 8 per entry and row.

    Raises:
        ValueError: shapes and numbers that do not fit; on CPU, a row that is no law: NaN, a
            log-prob above 2^-10, an id outside the vocabulary or there twice, entries that are not
            best first. A GPU is not waited for: such a row is marked there, and `decode_topk` says
            so; the same in a compiled graph.
        TypeError: a dtype. UnsupportedBackendError.

    Source: P. Elias (1974) and R. Fano (1971) for the ids; the quantiser is explained in
    docs/topk_codec.md.
    """
    op = "encode_topk"
    vocab_size, bits = _numbers(op, vocab_size, bits)
    _checks.tensor(op, "ids", ids, 2)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: ids must be int64 or int32, got {ids.dtype}.")
    _checks.tensor(op, "logprobs", logprobs, 2)
    _checks.floating(op, logprobs=logprobs)
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"{op}: logprobs must have the shape {tuple(ids.shape)} of ids, got "
            f"{tuple(logprobs.shape)}."
        )
    _topk(op, ids.shape[1], vocab_size)
    if tail_logprob is not None:
        _checks.tensor(op, "tail_logprob", tail_logprob, 1)
        if tail_logprob.dtype not in _checks.FLOATS:
            raise TypeError(f"{op}: tail_logprob must be floating, got {tail_logprob.dtype}.")
        _checks.length(op, "tail_logprob", tail_logprob, ids.shape[0], "ids")
    _checks.same_device(op, ids=ids, logprobs=logprobs, tail_logprob=tail_logprob)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(ids), backend)
    logprobs = logprobs.detach()
    if tail_logprob is None:
        tail_logprob = _tail_of(ids, logprobs, vocab_size)
    tail_logprob = tail_logprob.detach()
    if chosen == "reference":
        codes = reference.encode_topk(
            ids, logprobs, vocab_size=vocab_size, tail_logprob=tail_logprob, bits=bits
        ).codes
        return TopkCodes(codes.to(ids.device), ids.shape[1], vocab_size, bits)
    if ids.dtype == torch.int64:
        # what int32 cannot hold must not become an id by being cut
        ids = torch.where((ids < -1) | (ids >= vocab_size), -2, ids).to(torch.int32)
    codes, status = _dispatch.row_ops(chosen).topk_codec_encode(
        ids.contiguous(),
        logprobs.to(torch.float32).contiguous(),
        tail_logprob.to(torch.float32).contiguous(),
        vocab_size,
        bits,
    )
    _checks.rows_in_order(op, status, _WRONG)
    return TopkCodes(codes, ids.shape[1], vocab_size, bits)


def decode_topk(codes: TopkCodes, *, backend: str | None = None) -> TopkLaws:
    """The laws in rows of bytes, best first; equal log-probs come back by ascending id.

    logprobs[t, k] = largest[t] - scale[t] c (c + 2^(bits - 2)), c the code of the entry.

    Any bytes will do: nothing outside of them is read, and a row that encode_topk cannot have
    written is told by its status. Not every damage shows in a row: keep a checksum as well.

    Args:
        codes: from `encode_topk`, or those of its rows that you kept.
        backend: "cpu" | "cuda" | "reference"; None picks one.

    Returns:
        TopkLaws: ids [T, K] int32 and logprobs [T, K] float32 in nats, -1 and -inf behind the last
        entry; tail_logprob [T] float32; status [T] int32, 0 where the row is whole. Where it is
        not, ids are -1 and log-probs and tail NaN; `codec_status` has the words for the number.

    Raises:
        ValueError: codes of another shape than their num_topk, vocab_size and bits say.
        TypeError: codes that are not uint8. UnsupportedBackendError.

    Source: as `encode_topk`.
    """
    op = "decode_topk"
    if not isinstance(codes, tuple) or len(codes) != 4:
        raise TypeError(f"{op}: codes must be a TopkCodes, got {type(codes).__name__}.")
    rows, num_topk, vocab_size, bits = codes
    vocab_size, bits = _numbers(op, vocab_size, bits)
    num_topk = _topk(op, num_topk, vocab_size)
    _checks.tensor(op, "codes.codes", rows, 2)
    if rows.dtype != torch.uint8:
        raise TypeError(f"{op}: codes.codes must be uint8, got {rows.dtype}.")
    expected = topk_row_bytes(num_topk, vocab_size, bits)
    if rows.shape[1] != expected:
        raise ValueError(
            f"{op}: codes.codes must have {expected} bytes per row for num_topk={num_topk}, "
            f"vocab_size={vocab_size}, bits={bits}, got {rows.shape[1]}."
        )
    chosen = _dispatch.select(_OP, _dispatch.meta_of(rows), backend)
    if chosen == "reference":
        laws = reference.decode_topk(reference.TopkCodes(rows, num_topk, vocab_size, bits))
        return TopkLaws(*(value.to(rows.device) for value in laws))
    return TopkLaws(
        *_dispatch.row_ops(chosen).topk_codec_decode(rows.contiguous(), num_topk, vocab_size, bits)
    )


def topk_row_bytes(num_topk: int, vocab_size: int, bits: int = _DEFAULT_BITS) -> int:
    """Bytes of one row: 12 + ids + codes, rounded up to a multiple of 4.

    ids = ceil((K + floor((V - 1) / 2^l)) / 8) + ceil(K l / 8), l = floor(log2(V / K)).

    Args:
        num_topk: K. vocab_size: V. bits: of a log-prob.

    Raises:
        ValueError: there is no such row. TypeError: something else than an int.
    """
    op = "topk_row_bytes"
    vocab_size, bits = _numbers(op, vocab_size, bits)
    num_topk = _topk(op, num_topk, vocab_size)
    low_bits = (vocab_size // num_topk).bit_length() - 1
    high = num_topk + ((vocab_size - 1) >> low_bits)
    parts = (high, num_topk * low_bits, num_topk * bits)
    return -(-(_HEADER_BYTES + sum(-(-part // 8) for part in parts)) // 4) * 4


def codec_status(status: int) -> str:
    """Words for a status of `decode_topk`, or for what `encode_topk` refuses; "" for 0."""
    return "" if status == 0 else _WRONG.get(int(status), f"unknown status {int(status)}")


def _numbers(op: str, vocab_size: int, bits: int) -> tuple[int, int]:
    for name, value, low, high in (
        ("vocab_size", vocab_size, 1, _MAX_VOCAB),
        ("bits", bits, _MIN_BITS, _MAX_BITS),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}.")
        if not low <= value <= high:
            raise ValueError(f"{op}: {name} must be in [{low}, {high}], got {value}.")
    return vocab_size, bits


def _topk(op: str, num_topk: int, vocab_size: int) -> int:
    if isinstance(num_topk, bool) or not isinstance(num_topk, int):
        raise TypeError(f"{op}: num_topk must be an int, got {type(num_topk).__name__}.")
    if not 1 <= num_topk <= min(MAX_TOPK, vocab_size):
        raise ValueError(
            f"{op}: num_topk must be in [1, {MAX_TOPK}] and at most vocab_size={vocab_size}, got "
            f"{num_topk}."
        )
    return num_topk


def _tail_of(ids: Tensor, logprobs: Tensor, vocab_size: int) -> Tensor:
    """log(1 - sum_k exp logprobs_k); NaN, which is refused, where the sum is above 1."""
    values = logprobs.double()
    # what K roundings of 2^-10 relative size can add up to; beyond it these are no log-probs
    is_law = values.logsumexp(1) <= 2.0**-10
    tail = _cells.log_rest(values, logprobs.dtype, (ids >= 0).sum(1) == vocab_size)
    return torch.where(is_law, tail, torch.nan)


def _encode_fake(ids, logprobs, tail_logprob, vocab_size, bits):
    # how long a row is can be no symbol
    num_bytes = topk_row_bytes(int(ids.shape[1]), vocab_size, bits)
    return (
        ids.new_empty(ids.shape[0], num_bytes, dtype=torch.uint8),
        ids.new_empty(ids.shape[0]),
    )


def _decode_fake(codes, num_topk, vocab_size, bits):
    num_tokens = codes.shape[0]
    return (
        codes.new_empty(num_tokens, num_topk, dtype=torch.int32),
        codes.new_empty(num_tokens, num_topk, dtype=torch.float32),
        codes.new_empty(num_tokens, dtype=torch.float32),
        codes.new_empty(num_tokens, dtype=torch.int32),
    )


register("topk_codec_encode", fake=_encode_fake)
register("topk_codec_decode", fake=_decode_fake)
