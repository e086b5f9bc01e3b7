# SPDX-License-Identifier: Apache-2.0
"""What the clients of all kinds of servers share: checks of a call, parts of it in parallel."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd.batch import Head
from opd.clients import daemons
from opd.clients.protocol import (
    SIGNALS,
    BadReply,
    Scores,
    Signal,
    TeacherInfo,
    TeacherRefused,
    TeacherUnavailable,
)
from opd.clients.transport import Deadline, Transport
from opd.wire import JSON_TYPE

_NO_PROGRESS = 3


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of every sequence of a call."""

    signal: Signal
    num_topk: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence of a call.

    Attributes:
        index: its place in the call.
        ids: [S] int64, on the CPU.
        start: its first scored token.
        query_ids: [C, J] int64, or None for the completion's own tokens.
    """

    index: int
    ids: Tensor
    start: int
    query_ids: Tensor | None

    @property
    def completion(self) -> Tensor:
        """[C] int32."""
        return self.ids[self.start :].int()

    @property
    def num_rows(self) -> int:
        """C."""
        return len(self.ids) - self.start


class HttpClient(ABC):
    """A teacher server over HTTP.

    Args:
        url: http(s)://host[:port].
        vocab_size: of the student: what is sent and what comes back must lie within it.
        concurrency: requests under way at once.
        deadline_s: of one call of `score`, retries and waiting included.
        max_tokens_per_request: sequences are sent together up to so many tokens.
        settings: of `Transport`.
    """

    kind: ClassVar[str]
    takes_query_ids: ClassVar[bool] = False
    takes_empty_completions: ClassVar[bool] = False

    def __init__(
        self,
        url: str,
        *,
        vocab_size: int | None = None,
        concurrency: int = 4,
        deadline_s: float = 600.0,
        max_tokens_per_request: int = 16_384,
        **settings: Any,
    ) -> None:
        if concurrency < 1 or max_tokens_per_request < 1 or not deadline_s > 0:
            raise TeacherRefused(
                "teacher server: concurrency, deadline_s and max_tokens_per_request must be above "
                f"0, got {concurrency}, {deadline_s} and {max_tokens_per_request}"
            )
        self.transport = Transport(url, **settings)
        self.url = self.transport.url
        self.vocab_size = vocab_size
        self._concurrency = concurrency
        self._deadline_s = deadline_s
        self._max_tokens = max_tokens_per_request
        self._info: TeacherInfo | None = None
        self._info_lock = threading.Lock()

    @abstractmethod
    def _ask_info(self, deadline: Deadline) -> TeacherInfo:
        """What the server says of itself."""

    @abstractmethod
    def _score_part(
        self, items: Sequence[Item], ask: Ask, deadline: Deadline
    ) -> Sequence[Scores | None]:
        """One request; None for a sequence that the reply leaves out."""

    def info(self) -> TeacherInfo:
        """What the server says of itself, asked once."""
        return self._known_info(Deadline(self._deadline_s))

    def check(self, tokenizer: Any) -> list[str]:
        """Refuse a server of another vocabulary; returns what it gives no means to check.

        Raises:
            TeacherRefused: its tokens are not the tokenizer's.
            TeacherUnavailable: no answer.
        """
        self.info()
        return [
            f"teacher {self.url}: a {self.kind} server says nothing of its tokenizer, so nothing "
            "checks that its tokens are the student's"
        ]

    def head(self) -> Head:
        """What makes logits of hidden states.

        Raises:
            TeacherRefused: this kind of server sends no hidden states.
        """
        raise TeacherRefused(f"teacher {self.url}: a {self.kind} server sends no hidden states")

    def close(self) -> None:
        """Let go of the connections."""
        self.transport.close()

    def score(
        self,
        sequences: Sequence[Tensor],
        starts: Sequence[int],
        *,
        signal: Signal = "topk",
        num_topk: int = 64,
        query_ids: Sequence[Tensor] | None = None,
        temperature: float = 1.0,
    ) -> list[Scores]:
        """One `Scores` per sequence; `opd.clients` says what is in them.

        Raises:
            TeacherRefused: what is asked for is not possible there; says what is.
            BadReply: a reply that is no law of these tokens.
            TeacherUnavailable: no answer until the deadline; holds what came.
        """
        deadline = Deadline(self._deadline_s)
        items = self._items(sequences, starts, query_ids)
        ask = Ask(signal, num_topk, float(temperature))
        try:
            self._check_ask(ask, items, self._known_info(deadline))
        except TeacherUnavailable as error:
            error.results = [None] * len(items)
            raise
        results: list[Scores | None] = [None] * len(items)
        if not self.takes_empty_completions:
            for item in items:
                results[item.index] = None if item.num_rows else _of_nothing(item, ask)
            items = [item for item in items if item.num_rows]
        parts = self._parts(items, ask)
        if len(parts) == 1:
            parts, failure = [], self._finish(parts[0], ask, deadline, results)
            if failure is not None:
                raise _with_results(failure, results)
        self._in_parallel(parts, ask, deadline, results)
        return [scores for scores in results if scores is not None]

    def _in_parallel(
        self,
        parts: list[list[Item]],
        ask: Ask,
        deadline: Deadline,
        results: list[Scores | None],
    ) -> None:
        if not parts:
            return
        futures = daemons.start(
            [partial(self._must_finish, part, ask, deadline, results) for part in parts],
            num_threads=self._concurrency,
        )
        try:
            done, left = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future.exception() for future in done if future.exception() is not None]
            # the others of a server that does not answer may yet be answered
            if all(isinstance(error, TeacherUnavailable) for error in failed):
                wait(left)
                failed += [future.exception() for future in left if future.exception() is not None]
            for error in sorted(failed, key=lambda error: isinstance(error, TeacherUnavailable)):
                raise _with_results(error, results)
        finally:
            # neither a refusal nor Ctrl-C waits for a dead teacher
            deadline.cancel()
            for future in futures:
                future.cancel()

    def _post_json(self, path: str, body: Any, deadline: Deadline, parse: Any) -> Any:
        return self.transport.call(
            "POST",
            path,
            deadline=deadline,
            parse=parse,
            content=json.dumps(body).encode(),
            headers={"content-type": JSON_TYPE},
        )

    def _must_finish(self, *arguments: Any) -> None:
        failure = self._finish(*arguments)
        if failure is not None:
            raise failure

    def _finish(
        self, part: list[Item], ask: Ask, deadline: Deadline, results: list[Scores | None]
    ) -> BaseException | None:
        """Ask until every sequence of the part has its scores; those that have are left out."""
        fruitless = 0
        while part:
            try:
                scores = self._score_part(part, ask, deadline)
            except (BadReply, TeacherRefused, TeacherUnavailable) as error:
                return error
            if len(scores) != len(part):
                return BadReply(
                    f"teacher {self.url}: {len(part)} sequences were sent, {len(scores)} came back"
                )
            for item, found in zip(part, scores, strict=True):
                if found is not None:
                    results[item.index] = found
            left = [item for item in part if results[item.index] is None]
            fruitless = fruitless + 1 if len(left) == len(part) else 0
            if fruitless == _NO_PROGRESS:
                return BadReply(
                    f"teacher {self.url}: its replies leave out the log-probabilities of "
                    f"{len(left)} sequences, {_NO_PROGRESS} times in a row; does it send those of "
                    "prompts?"
                )
            part = left
        return None

    def _known_info(self, deadline: Deadline) -> TeacherInfo:
        with self._info_lock:
            if self._info is None:
                self._info = self._ask_info(deadline)
            return self._info

    def _items(
        self,
        sequences: Sequence[Tensor],
        starts: Sequence[int],
        query_ids: Sequence[Tensor] | None,
    ) -> list[Item]:
        if len(sequences) != len(starts) or (query_ids and len(query_ids) != len(sequences)):
            raise TeacherRefused(
                f"score: sequences, starts and query_ids must be of one length, got "
                f"{len(sequences)}, {len(starts)} and {len(query_ids or ())}"
            )
        items = []
        for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
            ids = torch.as_tensor(ids).detach().cpu()
            if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise TeacherRefused(
                    f"score: sequence {index} must be [S] of ints, got {ids.dtype} "
                    f"{list(ids.shape)}"
                )
            if not 1 <= start <= len(ids):
                raise TeacherRefused(
                    f"score: sequence {index} of {len(ids)} tokens must start between 1 and "
                    f"{len(ids)}, got {start}; nothing predicts its first token"
                )
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
                raise TeacherRefused(
                    f"score: sequence {index} has ids from {low} to {high}, must be in "
                    f"[0, {self.vocab_size or 'vocab_size'})"
                )
            query = None if query_ids is None else self._query(query_ids[index], ids, int(start))
            items.append(Item(index, ids.long(), int(start), query))
        return items

    def _query(self, query: Tensor, ids: Tensor, start: int) -> Tensor | None:
        query = torch.as_tensor(query).detach().cpu().long()
        if query.dim() != 2 or query.shape[0] != len(ids) - start:
            raise TeacherRefused(
                f"score: query_ids must be [{len(ids) - start}, J] for this sequence, got "
                f"{list(query.shape)}"
            )
        if query.shape[1] == 1 and torch.equal(query[:, 0], ids[start:].long()):
            return None
        if not self.takes_query_ids:
            raise TeacherRefused(
                f"teacher {self.url}: a {self.kind} server scores no other ids than the "
                "completion's own; use an opd server"
            )
        if query.numel() and self.vocab_size is not None and int(query.max()) >= self.vocab_size:
            raise TeacherRefused(
                f"score: query_ids must be below {self.vocab_size}, got {int(query.max())}"
            )
        return query

    def _check_ask(self, ask: Ask, items: Sequence[Item], info: TeacherInfo) -> None:
        where = f"teacher {self.url}"
        if ask.signal not in SIGNALS:
            raise TeacherRefused(f"score: signal must be one of {SIGNALS}, got {ask.signal!r}")
        if ask.signal not in info.signals:
            raise TeacherRefused(
                f"{where}: a {self.kind} server does not send {ask.signal!r}, only "
                f"{', '.join(sorted(info.signals))}"
            )
        if not 0 < ask.temperature < float("inf"):
            raise TeacherRefused(f"score: temperature must be above 0, got {ask.temperature}")
        if ask.temperature != 1.0 and not info.takes_temperature:
            raise TeacherRefused(
                f"{where}: a {self.kind} server reports the log-probabilities of a prompt at "
                f"temperature 1 only, got temperature {ask.temperature}; use an opd server "
                "(`opd serve-teacher`), which is exact at any temperature"
            )
        if ask.signal == "topk":
            self._check_topk(ask.num_topk, info, where)
        longest = max((len(item.ids) for item in items), default=0)
        if info.max_length is not None and longest > info.max_length:
            raise TeacherRefused(
                f"{where}: a sequence has {longest} tokens, and the server takes at most "
                f"{info.max_length}; shorten prompts or completions, or start it with a longer "
                f"context"
            )

    def _check_topk(self, num_topk: int, info: TeacherInfo, where: str) -> None:
        if num_topk < 1 or (info.vocab_size is not None and num_topk > info.vocab_size):
            raise TeacherRefused(
                f"score: num_topk must be in [1, {info.vocab_size or 'vocab_size'}], got {num_topk}"
            )
        if info.max_topk is not None and num_topk > info.max_topk:
            raise TeacherRefused(
                f"{where}: num_topk is {num_topk}, and the server gives at most {info.max_topk}"
            )

    def _parts(self, items: Sequence[Item], ask: Ask) -> list[list[Item]]:
        """Neighbours together, up to the tokens of a request; spread over the connections."""
        total = sum(len(item.ids) for item in items)
        budget = min(self._max_tokens, max(1, -(-total // self._concurrency)))
        parts: list[list[Item]] = []
        filled = budget
        for item in items:
            if filled + len(item.ids) > budget:
                parts.append([])
                filled = 0
            parts[-1].append(item)
            filled += len(item.ids)
        return parts


def _of_nothing(item: Item, ask: Ask) -> Scores:
    """Of an empty completion nothing needs to be asked."""
    best: dict[str, Tensor] = {}
    if ask.signal == "topk":
        best = {
            "ids": torch.empty(0, ask.num_topk, dtype=torch.int32),
            "logprobs": torch.empty(0, ask.num_topk),
            "tail_logprob": torch.empty(0),
        }
    return Scores(token_ids=item.completion, token_logprobs=torch.empty(0, 1), **best)


def _with_results(error: BaseException, results: list[Scores | None]) -> BaseException:
    if isinstance(error, TeacherUnavailable):
        error.results = list(results)
    return error
