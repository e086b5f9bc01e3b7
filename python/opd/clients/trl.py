# SPDX-License-Identifier: Apache-2.0
"""Client of `trl vllm-serve`, which TRL is about to drop in favour of stock vLLM.

POST /get_sequence_logprobs/ answers with arrays [B, longest completion, K] in base64 ("binary"),
padded with -inf, or with nested lists ("json") of the K best and the token itself, by rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from opd.clients.arrays import pad_rows, read_base64, read_shape
from opd.clients.http_client import Ask, HttpClient, Item
from opd.clients.laws import canonical_topk, finite_logprobs, tail_of
from opd.clients.protocol import BadReply, Scores, TeacherInfo, TeacherRefused
from opd.clients.reading import read_json, read_number
from opd.clients.transport import Deadline


class TrlClient(HttpClient):
    """Of a TRL server.

    Args:
        response_format: "binary", or "json" of older servers.
        settings: as in `HttpClient`.
    """

    kind = "trl"

    def __init__(
        self, url: str, *, response_format: Literal["binary", "json"] = "binary", **settings: Any
    ) -> None:
        super().__init__(url, **settings)
        if response_format not in ("binary", "json"):
            raise TeacherRefused(
                "teacher server: response_format must be 'binary' or 'json', got "
                f"{response_format!r}"
            )
        self._format = response_format

    def _ask_info(self, deadline: Deadline) -> TeacherInfo:
        # it says nothing of its model; this only shows that it is there
        self.transport.call("GET", "/health/", deadline=deadline)
        return TeacherInfo()

    def _score_part(
        self, items: Sequence[Item], ask: Ask, deadline: Deadline
    ) -> Sequence[Scores | None]:
        path = "/get_sequence_logprobs/"
        where = f"teacher {self.url}: {path}"
        num_topk = ask.num_topk if ask.signal == "topk" else 1
        body = {
            "sequences": [item.ids.tolist() for item in items],
            "prompt_lengths": [item.start for item in items],
            "top_logprobs": num_topk,
            "temperature": 1.0,
            "response_format": self._format,
        }
        read = self._binary if self._format == "binary" else self._lists

        def parse(reply: bytes, _: Mapping[str, str]) -> list[Scores]:
            return read(read_json(reply, where), items, ask, num_topk, where)

        return self._post_json(path, body, deadline, parse)

    def _binary(
        self, found: dict[str, Any], items: Sequence[Item], ask: Ask, num_topk: int, where: str
    ) -> list[Scores]:
        shape = read_shape(found.get("shape"), f"{where}: shape", rank=3)
        lengths = [item.num_rows for item in items]
        wanted = (len(items), max(lengths), num_topk)
        if shape != wanted or found.get("completion_lengths") != lengths:
            raise BadReply(
                f"{where}: must be of shape {list(wanted)} with completion_lengths {lengths[:8]}, "
                f"got {list(shape)} and {found.get('completion_lengths')!r:.80}"
            )
        own = (*shape[:2], 1)
        logprobs, ids, chosen, chosen_ids = (
            read_base64(found.get(name), dtype, sizes, f"{where}: {name}")
            for name, dtype, sizes in (
                ("logprobs_b64", "float32", shape),
                ("token_ids_b64", "int32", shape),
                ("actual_logprobs_b64", "float32", own),
                ("actual_token_ids_b64", "int32", own),
            )
        )
        scores = []
        for place, item in enumerate(items):
            rows = slice(0, item.num_rows)
            if not torch.equal(chosen_ids[place, rows, 0], item.completion):
                raise BadReply(
                    f"{where}: actual_token_ids are not the completion's tokens; the rows are "
                    "shifted, or the server tokenizes anew"
                )
            values = chosen[place, rows]
            scores.append(
                self._scores(item, ids[place, rows], logprobs[place, rows], values, ask, where)
            )
        return scores

    def _lists(
        self, found: dict[str, Any], items: Sequence[Item], ask: Ask, num_topk: int, where: str
    ) -> list[Scores]:
        names = ("logprobs", "logprob_token_ids")
        for name in names:
            if not isinstance(found.get(name), list) or len(found[name]) != len(items):
                raise BadReply(f"{where}: {name} must have {len(items)} sequences")
        scores = []
        for item, values, ids in zip(items, *(found[name] for name in names), strict=True):
            rows = _rows(ids, values, item, num_topk, where)
            own = []
            for place, token in enumerate(item.completion.tolist()):
                row_ids, row_values = rows[place]
                if token not in row_ids:
                    raise BadReply(
                        f"{where}: row {place} has no log-probability of its own token {token}; "
                        "the rows are shifted, or the server tokenizes anew"
                    )
                own.append(row_values[row_ids.index(token)])
            chosen = torch.tensor(own, dtype=torch.float64)[:, None]
            scores.append(self._scores(item, *pad_rows(rows, num_topk), chosen, ask, where))
        return scores

    def _scores(
        self, item: Item, ids: Any, logprobs: Any, chosen: Any, ask: Ask, where: str
    ) -> Scores:
        chosen = finite_logprobs(chosen, where)
        # also of a signal that needs no more than `chosen`: a wrong law is a wrong law
        num_topk = ask.num_topk if ask.signal == "topk" else 1
        ids, logprobs = canonical_topk(
            ids, logprobs, num_topk=num_topk, vocab_size=self.vocab_size, where=where
        )
        if ask.signal != "topk":
            return Scores(token_ids=item.completion, token_logprobs=chosen)
        return Scores(
            token_ids=item.completion,
            ids=ids,
            logprobs=logprobs,
            tail_logprob=tail_of(logprobs),
            token_logprobs=chosen,
        )


def _rows(
    ids: Any, values: Any, item: Item, num_topk: int, where: str
) -> list[tuple[list[int], list[float]]]:
    """Pairs of ids and log-probabilities, one per token of the completion."""
    for name, lists in (("logprob_token_ids", ids), ("logprobs", values)):
        if not isinstance(lists, list) or len(lists) != item.num_rows:
            got = f"{len(lists)}" if isinstance(lists, list) else type(lists).__name__
            raise BadReply(f"{where}: {name} must have {item.num_rows} rows, got {got}")
    rows = []
    for row_ids, row_values in zip(ids, values, strict=True):
        both = isinstance(row_ids, list) and isinstance(row_values, list)
        if not both or len(row_ids) != len(row_values) or len(row_ids) > num_topk + 1:
            raise BadReply(
                f"{where}: a row must have at most {num_topk + 1} ids and as many "
                f"log-probabilities, got {row_ids!r:.60} and {row_values!r:.60}"
            )
        if not all(type(token) is int and 0 <= token < 1 << 31 for token in row_ids):
            raise BadReply(f"{where}: a row has something that is no token id: {row_ids!r:.80}")
        rows.append((row_ids, [read_number(value, where) for value in row_values]))
    return rows
