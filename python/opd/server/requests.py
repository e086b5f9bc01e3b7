# SPDX-License-Identifier: Apache-2.0
"""Requests off the wire. Every length and id is checked here, before anything uses it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opd.wire import CONTENT_TYPE, DTYPES, JSON_TYPE, Message, WireError, unpack

Signal = Literal["topk", "token_logprobs", "hidden"]
_MAX_TEMPERATURE = 1e4
_KEYS = {
    "topk": {"temperature", "vocab_size", "num_topk"},
    "token_logprobs": {"temperature", "vocab_size"},
    "hidden": {"temperature", "vocab_size", "dtype", "projected"},
}


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: for the person who sent it: what was expected, what came.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may be.

    Attributes:
        vocab_size: tokens of the model's head.
        input_size: tokens of its input embeddings.
        max_length: tokens of a sequence.
        max_topk, max_query_ids: of a position.
        max_request_tokens: tokens of all sequences together.
        max_sequences: in a request.
        max_request_bytes, max_reply_bytes: of the bodies.
        hidden_rank: of projected hidden states; 0: there are none.
        hidden_size: of the others.
    """

    vocab_size: int
    input_size: int
    max_length: int
    max_topk: int = 4096
    max_query_ids: int = 4096
    max_request_tokens: int = 65_536
    max_sequences: int = 1024
    max_request_bytes: int = 64 << 20
    max_reply_bytes: int = 1 << 30
    hidden_rank: int = 0
    hidden_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreRequest:
    """A checked request.

    Attributes:
        signal: what is asked for.
        sequences: int64 [S] each.
        starts: the first scored token of each.
        query_ids: int64 [C, J] each, -1: no id; or None for the completion's own tokens.
        num_topk, temperature: of the laws.
        vocab_size: the laws are over the first so many tokens.
        dtype, is_projected: of hidden states.
        is_json: how the reply travels.
        crc32: of the request, for the reply to name it by.
    """

    signal: Signal
    sequences: list[Tensor]
    starts: list[int]
    query_ids: list[Tensor] | None
    num_topk: int
    temperature: float
    vocab_size: int
    dtype: torch.dtype
    is_projected: bool
    is_json: bool
    crc32: int

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return sum(len(ids) for ids in self.sequences)

    @property
    def num_rows(self) -> int:
        """Laws that the reply has."""
        return self.num_tokens - sum(self.starts)


def parse_request(
    body: bytes, *, content_type: str, signal: Signal, limits: Limits
) -> ScoreRequest:
    """The request in a body.

    Raises:
        RequestError: 415 for another content type, 400 for bytes that are none of ours, 413 for
            too much, 422 for values out of range.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == CONTENT_TYPE:
        return _binary(body, signal, limits)
    if kind == JSON_TYPE:
        # as Python objects it is many times larger
        most = limits.max_request_bytes // 8
        if len(body) > most:
            raise RequestError(413, f"a JSON body has at most {most} bytes, got {len(body)}")
        return _json(body, signal, limits)
    raise RequestError(
        415, f"content-type must be {CONTENT_TYPE} or {JSON_TYPE}, got {content_type[:100]!r}"
    )


def _binary(body: bytes, signal: Signal, limits: Limits) -> ScoreRequest:
    try:
        message = unpack(body)
        meta = message.meta
        token_ids = message.take("token_ids", torch.int32, (None,))
        lengths = message.take("lengths", torch.int32, (None,))
        starts = message.take("starts", torch.int32, (len(lengths),))
        queries = _queries(message)
    except WireError as error:
        raise RequestError(400, str(error)) from None
    _check_counts(len(token_ids), len(lengths), limits)
    sizes = lengths.tolist()
    if any(size < 0 for size in sizes) or sum(sizes) != len(token_ids):
        raise RequestError(
            422, f"lengths must sum to the {len(token_ids)} token_ids, got {sum(sizes)}"
        )
    sequences = list(token_ids.long().split(sizes))
    return _check(
        sequences, starts.tolist(), queries, meta, signal, limits, message.crc32, is_json=False
    )


def _queries(message: Message) -> Tensor | None:
    if "query_ids" not in message.tensors:
        return None
    return message.take("query_ids", torch.int32, (None, None))


def _json(body: bytes, signal: Signal, limits: Limits) -> ScoreRequest:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON, {error}") from None
    if not isinstance(found, dict):
        raise RequestError(400, f"the body must be an object, got {type(found).__name__}")
    if signal == "hidden":
        raise RequestError(415, f"hidden states travel as {CONTENT_TYPE} only")
    meta = {k: v for k, v in found.items() if k not in ("sequences", "starts", "query_ids")}
    lists = found.get("sequences")
    if not _is_list_of(lists, list):
        raise RequestError(422, "sequences must be a list of lists of token ids")
    _check_counts(sum(map(len, lists)), len(lists), limits)
    sequences = [_ints(ids, f"sequence {i}") for i, ids in enumerate(lists)]
    starts = _ints(found.get("starts"), "starts").tolist()
    if len(starts) != len(sequences):
        raise RequestError(422, f"starts must have {len(sequences)} items, got {len(starts)}")
    queries = None
    if found.get("query_ids") is not None:
        queries = _json_queries(found["query_ids"], sequences, starts)
    return _check(sequences, starts, queries, meta, signal, limits, zlib.crc32(body), is_json=True)


def _json_queries(found: Any, sequences: list[Tensor], starts: list[int]) -> Tensor:
    if not _is_list_of(found, list) or len(found) != len(sequences):
        raise RequestError(422, "query_ids must be, for each sequence, a list of lists of ids")
    for index, (rows, ids, start) in enumerate(zip(found, sequences, starts, strict=True)):
        if len(rows) != len(ids) - start:
            raise RequestError(
                422,
                f"query_ids of sequence {index} must have {len(ids) - start} rows, got {len(rows)}",
            )
    rows = [_ints(row, "query_ids") for rows in found for row in rows]
    if len({len(row) for row in rows}) > 1:
        raise RequestError(422, "query_ids must have equally many ids at every position")
    return torch.stack(rows) if rows else torch.empty(0, 1, dtype=torch.int64)


def _check(
    sequences: list[Tensor],
    starts: list[int],
    queries: Tensor | None,
    meta: dict[str, Any],
    signal: Signal,
    limits: Limits,
    crc32: int,
    *,
    is_json: bool,
) -> ScoreRequest:
    unknown = sorted(map(str, meta.keys() - _KEYS[signal]))
    if unknown:
        raise RequestError(
            422, f"unknown keys {unknown[:5]}, {signal} takes {sorted(_KEYS[signal])}"
        )
    vocab_size = _number(meta, "vocab_size", limits.vocab_size, 1, limits.vocab_size)
    for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        if len(ids) > limits.max_length:
            raise RequestError(
                422, f"sequence {index} has {len(ids)} tokens, at most {limits.max_length} fit"
            )
        if not 1 <= start <= len(ids):
            raise RequestError(422, f"starts[{index}] must be in [1, {len(ids)}], got {start}")
        _check_range(ids, 0, limits.input_size, f"sequence {index}")
        if queries is None:
            _check_range(ids[start:], 0, vocab_size, f"the completion of sequence {index}")
    num_rows = sum(len(ids) - start for ids, start in zip(sequences, starts, strict=True))
    query_ids = None
    if queries is not None and signal != "hidden":
        if queries.dim() != 2 or len(queries) != num_rows:
            raise RequestError(
                422, f"query_ids must have {num_rows} rows, got {list(queries.shape)}"
            )
        if queries.shape[1] > limits.max_query_ids:
            raise RequestError(
                422, f"at most {limits.max_query_ids} query_ids a row, got {queries.shape[1]}"
            )
        _check_range(queries, -1, vocab_size, "query_ids")
        sizes = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        query_ids = list(queries.long().split(sizes))
    dtype = meta.get("dtype", "bfloat16")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RequestError(422, f"dtype must be one of {sorted(DTYPES)}, got {dtype!r:.100}")
    projected = meta.get("projected", False)
    if not isinstance(projected, bool):
        raise RequestError(422, f"projected must be true or false, got {projected!r:.100}")
    if projected and not limits.hidden_rank:
        raise RequestError(422, "projected: this server was started without --hidden-rank")
    most_topk = min(limits.max_topk, vocab_size)
    request = ScoreRequest(
        signal=signal,
        sequences=sequences,
        starts=starts,
        query_ids=query_ids,
        num_topk=_number(meta, "num_topk", min(64, most_topk), 1, most_topk),
        temperature=_temperature(meta),
        vocab_size=vocab_size,
        dtype=DTYPES[dtype],
        is_projected=projected,
        is_json=is_json,
        crc32=crc32,
    )
    _check_reply(request, limits)
    return request


def _check_counts(num_tokens: int, num_sequences: int, limits: Limits) -> None:
    if not 1 <= num_sequences <= limits.max_sequences:
        status = 413 if num_sequences else 422
        raise RequestError(
            status, f"a request has 1 to {limits.max_sequences} sequences, got {num_sequences}"
        )
    if num_tokens > limits.max_request_tokens:
        raise RequestError(
            413, f"a request has at most {limits.max_request_tokens} tokens, got {num_tokens}"
        )


def _check_reply(request: ScoreRequest, limits: Limits) -> None:
    if request.signal == "hidden":
        width = limits.hidden_rank if request.is_projected else limits.hidden_size
        row_bytes = width * request.dtype.itemsize + 4
    else:
        queries = request.query_ids
        row_bytes = 8 + 4 * (1 if queries is None else queries[0].shape[1])
        row_bytes += 8 * request.num_topk if request.signal == "topk" else 0
    # a number is some 20 characters of JSON
    size = request.num_rows * row_bytes * (5 if request.is_json else 1)
    if size > limits.max_reply_bytes:
        raise RequestError(
            413,
            f"the reply would have {size} bytes, at most {limits.max_reply_bytes}; send fewer "
            "sequences at a time",
        )


def _check_range(ids: Tensor, low: int, end: int, what: str) -> None:
    if not ids.numel():
        return
    least, most = int(ids.min()), int(ids.max())
    if least < low or most >= end:
        raise RequestError(422, f"{what}: ids must be in [{low}, {end}), got {least} to {most}")


def _number(meta: dict[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = meta.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise RequestError(422, f"{key} must be an integer in [{low}, {high}], got {value!r:.100}")
    return value


def _temperature(meta: dict[str, Any]) -> float:
    value = meta.get("temperature", 1.0)
    # compared as it is: an int of JSON may be too large for a float
    is_number = type(value) in (int, float)
    if not is_number or not 1 / _MAX_TEMPERATURE <= value <= _MAX_TEMPERATURE:
        raise RequestError(
            422,
            f"temperature must be a number in [{1 / _MAX_TEMPERATURE:g}, {_MAX_TEMPERATURE:g}], "
            f"got {value!r:.100}",
        )
    return float(value)


def _ints(values: Any, what: str) -> Tensor:
    # bool is an int to isinstance, and large ints do not fit into a tensor
    if not isinstance(values, list) or not all(
        type(value) is int and -(1 << 31) <= value < 1 << 31 for value in values
    ):
        raise RequestError(422, f"{what} must be a list of integers")
    return torch.tensor(values, dtype=torch.int64)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
