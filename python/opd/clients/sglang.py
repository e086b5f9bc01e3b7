# SPDX-License-Identifier: Apache-2.0
"""Client of an SGLang server: /generate without generating, log-probabilities of the input.

A reply has, from token `logprob_start_len` on, `input_token_logprobs`: triples (log-prob, id, text
or null), and `input_top_logprobs`: lists of such triples, K of them, the token itself only if it is
among the best. In place of the lists there may be flat arrays, in JSON or in base64. The first row
may be null, so rows are counted from the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd.clients.arrays import pad_rows, read_base64, read_numbers, read_shape
from opd.clients.http_client import Ask, HttpClient, Item
from opd.clients.laws import canonical_topk, finite_logprobs, tail_of
from opd.clients.protocol import BadReply, Scores, TeacherInfo, TeacherRefused
from opd.clients.reading import load_json, read_json, read_number
from opd.clients.transport import Deadline, HttpRefused

_MAX_ID = 1 << 31


class SglangClient(HttpClient):
    """Of an SGLang server.

    Args:
        flat: ask for flat base64 arrays; a server that does not know them sends lists.
        settings: as in `HttpClient`.
    """

    kind = "sglang"

    def __init__(self, url: str, *, flat: bool = True, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._flat = flat

    def _ask_info(self, deadline: Deadline) -> TeacherInfo:
        where = f"teacher {self.url}: /get_model_info"
        found = self.transport.call(
            "GET",
            "/get_model_info",
            deadline=deadline,
            parse=lambda body, _: read_json(body, where),
        )
        model = found.get("model_path")
        return TeacherInfo(
            model=model if isinstance(model, str) else None,
            # it says in each reply whether the temperature was applied
            takes_temperature=True,
        )

    def _score_part(
        self, items: Sequence[Item], ask: Ask, deadline: Deadline
    ) -> Sequence[Scores | None]:
        where = f"teacher {self.url}: /generate"
        body: dict[str, Any] = {
            "input_ids": [item.ids.tolist() for item in items],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            # one before the first that is wanted: the first row may be null
            "logprob_start_len": [item.start - 1 for item in items],
            "return_text_in_logprobs": False,
        }
        if ask.signal == "topk":
            body["top_logprobs_num"] = [ask.num_topk] * len(items)
            if self._flat:
                body |= {
                    "return_flat_raw_top_logprobs": True,
                    "return_flat_raw_top_logprobs_b64": True,
                }
        if ask.temperature != 1.0:
            body["input_logprob_temperature"] = ask.temperature

        def parse(reply: bytes, _: Mapping[str, str]) -> list[Scores | None]:
            results = _results(reply, len(items), where)
            return [
                self._read(result, item, ask, where)
                for item, result in zip(items, results, strict=True)
            ]

        try:
            return self._post_json("/generate", body, deadline, parse)
        except HttpRefused as error:
            if "longer than" in error.reason or "context length" in error.reason:
                raise TeacherRefused(
                    f"teacher {self.url}: a sequence is longer than the server takes; shorten "
                    f"prompts or completions, or start it with a larger --context-length "
                    f"({error.reason})"
                ) from None
            raise

    def _read(self, result: Any, item: Item, ask: Ask, where: str) -> Scores | None:
        meta = result.get("meta_info") if isinstance(result, dict) else None
        if not isinstance(meta, dict):
            raise BadReply(f"{where}: a result has no meta_info, got {result!r:.80}")
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            return None
        if ask.temperature != 1.0 and meta.get("input_logprob_temperature") != ask.temperature:
            raise TeacherRefused(
                f"{where}: the server does not say that it applied temperature {ask.temperature} "
                "to the input's log-probabilities; it is too old for that. Use temperature 1, or "
                "an opd server"
            )
        chosen = self._own(meta.get("input_token_logprobs"), item, where)
        if ask.signal != "topk":
            return Scores(token_ids=item.completion, token_logprobs=chosen)
        ids, logprobs = self._best(meta, item, ask, where)
        ids, logprobs = canonical_topk(
            ids, logprobs, num_topk=ask.num_topk, vocab_size=self.vocab_size, where=where
        )
        _check_own_among_best(item, ids, logprobs, chosen, where)
        return Scores(
            token_ids=item.completion,
            ids=ids,
            logprobs=logprobs,
            tail_logprob=tail_of(logprobs),
            token_logprobs=chosen,
        )

    def _own(self, triples: Any, item: Item, where: str) -> Tensor:
        """[C, 1] log-probs of the completion's own tokens, each row known by its id."""
        rows = item.num_rows
        if not isinstance(triples, list) or not rows <= len(triples) <= len(item.ids):
            got = f"{len(triples)}" if isinstance(triples, list) else type(triples).__name__
            raise BadReply(
                f"{where}: input_token_logprobs must have {rows} to {len(item.ids)} rows, got {got}"
            )
        tokens = item.ids[-len(triples) :].tolist()
        values = []
        for place, (triple, token) in enumerate(zip(triples, tokens, strict=True)):
            value, found = _triple(triple, where)
            if found != token:
                raise BadReply(
                    f"{where}: row {place} of input_token_logprobs is of token {found}, sent was "
                    f"{token}; the rows are shifted, or the server tokenizes anew"
                )
            if place >= len(triples) - rows:
                values.append(read_number(value, where))
        return finite_logprobs(torch.tensor(values, dtype=torch.float64)[:, None], where)

    def _best(self, meta: Mapping[str, Any], item: Item, ask: Ask, where: str) -> Any:
        if "input_top_logprobs_shape" in meta:
            return self._flat_best(meta, item, ask, where)
        lists = meta.get("input_top_logprobs")
        own = meta["input_token_logprobs"]
        if not isinstance(lists, list) or len(lists) != len(own):
            got = f"{len(lists)}" if isinstance(lists, list) else type(lists).__name__
            raise BadReply(f"{where}: input_top_logprobs must have {len(own)} rows, got {got}")
        rows = []
        for triples in lists[len(lists) - item.num_rows :]:
            if not isinstance(triples, list) or len(triples) > ask.num_topk:
                raise BadReply(
                    f"{where}: a row of input_top_logprobs must have at most {ask.num_topk} "
                    f"triples, got {triples!r:.80}"
                )
            pairs = [_triple(triple, where) for triple in triples]
            rows.append(
                ([token for _, token in pairs], [read_number(value, where) for value, _ in pairs])
            )
        return pad_rows(rows, ask.num_topk)

    def _flat_best(self, meta: Mapping[str, Any], item: Item, ask: Ask, where: str) -> Any:
        name = "input_top_logprobs"
        rows, width = read_shape(meta[f"{name}_shape"], f"{where}: {name}_shape", rank=2)
        prefix = meta.get(f"{name}_null_prefix", 0)
        is_prefix = type(prefix) is int and 0 <= prefix <= rows
        if not is_prefix or rows != len(meta["input_token_logprobs"]) or width > ask.num_topk:
            raise BadReply(
                f"{where}: {name} must have {len(meta['input_token_logprobs'])} rows of at most "
                f"{ask.num_topk}, got {rows} of {width} behind {prefix!r:.20} nulls"
            )
        if rows - prefix < item.num_rows:
            raise BadReply(
                f"{where}: {name} has {rows - prefix} rows that are not null, needed are "
                f"{item.num_rows}"
            )
        shape, arrays = (rows - prefix, width), []
        for key in ("idx", "val"):
            encoded = f"{name}_{key}_flat_b64"
            if encoded in meta:
                dtype = str(meta.get(f"{encoded}_dtype"))
                arrays.append(read_base64(meta[encoded], dtype, shape, f"{where}: {encoded}"))
            else:
                flat = f"{name}_{key}_flat"
                arrays.append(read_numbers(meta.get(flat), shape, f"{where}: {flat}"))
        ids, logprobs = arrays
        if ids.is_floating_point() and not torch.equal(ids, ids.trunc()):
            raise BadReply(f"{where}: a token id is no integer")
        start = shape[0] - item.num_rows
        return ids[start:].long(), logprobs[start:]


def _results(reply: bytes, num_items: int, where: str) -> list[Any]:
    found = load_json(reply, where)
    # one sequence may come back without a list around it
    results = [found] if isinstance(found, dict) and num_items == 1 else found
    if not isinstance(results, list) or len(results) != num_items:
        got = f"{len(results)}" if isinstance(results, list) else type(results).__name__
        raise BadReply(f"{where}: the reply must have {num_items} results, got {got}")
    return results


def _triple(triple: Any, where: str) -> tuple[Any, int]:
    if not isinstance(triple, list) or not 2 <= len(triple) <= 3:
        raise BadReply(f"{where}: must be [log-prob, id, text], got {triple!r:.80}")
    value, token = triple[0], triple[1]
    if type(token) is not int or not 0 <= token < _MAX_ID:
        raise BadReply(f"{where}: {token!r:.50} is no token id")
    return value, token


def _check_own_among_best(
    item: Item, ids: Tensor, logprobs: Tensor, chosen: Tensor, where: str
) -> None:
    """A token of the text that is among the best has one log-probability, not two."""
    same = ids == item.completion[:, None]
    apart = (logprobs - chosen).abs().masked_fill(~same, 0.0)
    if apart.numel() and not float(apart.max()) <= 1e-2:
        raise BadReply(
            f"{where}: a token's own log-probability and that among the best differ by "
            f"{float(apart.max()):.3g}; the rows of the two lists are shifted"
        )
