# SPDX-License-Identifier: Apache-2.0
"""Replies of `opd serve-teacher`, read and checked: whatever is not in order is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.clients.http_client import Ask, Item
from opd.clients.laws import check_complete, check_ids, finite_logprobs
from opd.clients.protocol import BadReply, Scores
from opd.clients.reading import read_json
from opd.clients.transport import Damaged
from opd.wire import CRC_HEADER, Message, WireError, json_checksum, unpack

# what our JSON has for -inf: a law at a low temperature may well have a log-probability of -9999
ZERO_LOGPROB = torch.finfo(torch.float32).min


def checked_topk(
    ids: Tensor, logprobs: Tensor, tail: Tensor, vocab_size: int, where: str
) -> dict[str, Tensor]:
    """Of our own server: in order already, so anything else is an error and not to be mended."""
    logprobs, tail = (finite_logprobs(x, where, zero=ZERO_LOGPROB) for x in (logprobs, tail))
    check_ids(ids, vocab_size=vocab_size, where=where)
    tokens, values = ids.numpy(), logprobs.numpy()
    falling = (values[:, :-1] >= values[:, 1:]).all()
    ordered = np.sort(tokens, axis=1)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if repeated.any():
        repeated &= ordered[:, 1:] != -1
    paired = np.array_equal(tokens == -1, values == -np.inf)
    if not falling or repeated.any() or not paired:
        raise BadReply(f"{where}: its ids are not distinct, or not the best first")
    check_complete(logprobs, tail, where)
    return {"ids": ids, "logprobs": logprobs, "tail_logprob": tail}


def query_width(item: Item) -> int:
    """J of a sequence."""
    return 1 if item.query_ids is None else item.query_ids.shape[1]


def is_number(value: Any) -> bool:
    """A finite number other than 0, as a scale or a cap must be."""
    return type(value) in (int, float) and 0 < abs(value) < 1e30


def read_message(body: bytes, url: str) -> Message:
    """The message of a binary reply; `Damaged` if there is none."""
    try:
        return unpack(body)
    except WireError as error:
        raise Damaged(f"teacher {url}: {error}") from None


def read_object(body: bytes, headers: Mapping[str, str], where: str) -> dict[str, Any]:
    """The object of a JSON reply; `Damaged` if there is none."""
    checksum = headers.get(CRC_HEADER)
    if checksum is not None and checksum != json_checksum(body):
        raise Damaged(f"{where}: the reply's checksum does not fit, it was damaged on the way")
    return read_json(body, where)


def read_lists(
    found: dict[str, Any], items: Sequence[Item], ask: Ask, where: str, vocab_size: int
) -> list[Scores]:
    """The JSON form of a reply."""
    results = found.get("results")
    if not isinstance(results, list) or len(results) != len(items):
        raise BadReply(f"{where}: the reply must have {len(items)} results")
    scores = []
    for item, result in zip(items, results, strict=True):
        if not isinstance(result, dict):
            raise BadReply(f"{where}: a result must be an object")
        rows = item.num_rows

        def read(name: str, dtype: torch.dtype, *shape: int, result: Any = result) -> Tensor:
            try:
                tensor = torch.tensor(result[name], dtype=dtype)
            except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise BadReply(f"{where}: {name} is not numbers, {error!r}") from None
            if 0 in shape and tensor.numel() == 0:
                return tensor.reshape(shape)
            if tensor.shape != shape:
                raise BadReply(f"{where}: {name} must be {list(shape)}, got {list(tensor.shape)}")
            if dtype == torch.float32 and name not in ("entropy", "logit_error", "hidden"):
                return finite_logprobs(tensor, where, zero=ZERO_LOGPROB)
            if not tensor.isfinite().all():
                raise BadReply(f"{where}: {name} is not finite")
            return tensor

        columns: dict[str, Tensor] = {}
        columns["token_logprobs"] = read("token_logprobs", torch.float32, rows, query_width(item))
        columns["entropy"] = read("entropy", torch.float32, rows)
        if ask.signal == "topk":
            ids = read("ids", torch.int32, rows, ask.num_topk)
            logprobs = read("logprobs", torch.float32, rows, ask.num_topk)
            tail = read("tail_logprob", torch.float32, rows)
            columns |= checked_topk(ids, logprobs, tail, vocab_size, where)
        scores.append(Scores(token_ids=item.completion, **columns))
    return scores
