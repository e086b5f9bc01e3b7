# SPDX-License-Identifier: Apache-2.0
"""`prompt_logprobs` of vLLM as rows: a list as long as the prompt, null first, a map per token.

A map goes from the id, a string in JSON, to {logprob, rank, decoded_token}. The prompt's own token
is always in it; the best K are as well, so it has K entries or K + 1. -inf is written as -9999.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from opd.clients.arrays import pad_rows
from opd.clients.http_client import Ask, Item
from opd.clients.laws import canonical_topk, finite_logprobs, tail_of
from opd.clients.protocol import BadReply, Scores
from opd.clients.reading import read_number

_ID = re.compile(r"[0-9]{1,9}")


def prompt_scores(rows: Any, item: Item, ask: Ask, *, vocab_size: int | None, where: str) -> Scores:
    """What `prompt_logprobs` says of a completion.

    Raises:
        BadReply: another number of rows, rows of other tokens, more than K + 1 entries.
    """
    if not isinstance(rows, list) or len(rows) != len(item.ids):
        got = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise BadReply(
            f"{where}: prompt_logprobs must have one row per token of the prompt, "
            f"{len(item.ids)}, got {got}"
        )
    if rows[0] is not None:
        raise BadReply(
            f"{where}: the first row of prompt_logprobs must be null, as nothing comes before its "
            "token; this server's rows are shifted"
        )
    own, parsed = [], []
    for position in range(item.start, len(item.ids)):
        entries = _entries(rows[position], f"{where}: row {position}")
        token = int(item.ids[position])
        if token not in entries:
            raise BadReply(
                f"{where}: row {position} has no log-probability of its own token {token}, but of "
                f"{sorted(entries)[:5]}; the rows are shifted, or the server tokenizes anew"
            )
        if ask.signal == "topk" and len(entries) > ask.num_topk + 1:
            raise BadReply(
                f"{where}: row {position} has {len(entries)} entries, asked were the best "
                f"{ask.num_topk} and the token itself"
            )
        own.append(entries[token])
        parsed.append(entries)
    chosen = finite_logprobs(torch.tensor(own, dtype=torch.float64)[:, None], where)
    if ask.signal != "topk":
        return Scores(token_ids=item.completion, token_logprobs=chosen)
    # the token itself, where it is not among the best, is the last one and is cut off
    ids, logprobs = pad_rows([(list(row), list(row.values())) for row in parsed], ask.num_topk)
    ids, logprobs = canonical_topk(
        ids, logprobs, num_topk=ask.num_topk, vocab_size=vocab_size, where=where
    )
    return Scores(
        token_ids=item.completion,
        ids=ids,
        logprobs=logprobs,
        tail_logprob=tail_of(logprobs),
        token_logprobs=chosen,
    )


def _entries(row: Any, where: str) -> dict[int, float]:
    """id -> log-probability; of one id twice the first counts."""
    if not isinstance(row, Mapping):
        raise BadReply(f"{where}: must map ids to log-probabilities, got {row!r:.50}")
    entries: dict[int, float] = {}
    for key, entry in row.items():
        if not _ID.fullmatch(key):
            raise BadReply(f"{where}: {key!r:.50} is no token id")
        value = entry.get("logprob") if isinstance(entry, dict) else entry
        entries.setdefault(int(key), read_number(value, where))
    return entries
