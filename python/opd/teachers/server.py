# SPDX-License-Identifier: Apache-2.0
"""A teacher in another process: `opd serve-teacher`, vLLM, SGLang, or TRL's old server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from opd.batch import Batch, Head, Law
from opd.clients import (
    Client,
    Scores,
    Signal,
    TeacherRefused,
    TeacherUnavailable,
    connect,
    daemons,
)
from opd.schema import Section
from opd.sparse_law import SparseLaw, TopkRows, gather_rows

_log = logging.getLogger(__name__)
# how often `on_wait` is called
_LOOK_S = 0.1


class ServerConfig(Section):
    """A server that scores completions.

    Attributes:
        url: of the server, without a path, as in http://127.0.0.1:8642.
        protocol: what answers there: `opd` (opd serve-teacher), `vllm`, `sglang`, `trl`.
        signal: what is sent per token: `hidden`, final hidden states, from which every law follows
            exactly; or `topk`, log-probabilities of a few tokens. Default: hidden for `opd`.
        teacher_top_k: likeliest tokens to ask for where nobody says how many, as in evaluation.
        model: name of the served model, where the protocol asks for one.
        hidden_dtype: of hidden states on the wire; default: that of the teacher's weights.
        projected: hidden states on the leading singular directions of the head, which the server
            must have been started with; docs/teacher_server.md has the error.
        concurrency: requests under way at one time.
        request_timeout_s: of one try, without a byte from the server.
        deadline_s: without an answer for so long, a line says so; training waits and asks again,
            at its start as later.
        patience_s: after so long without an answer, training stops. Null: never.
        tokenizer_name_or_path: of the served model, where it is not the student's.

    The token of a server comes from the environment variable OPD_TEACHER_TOKEN.
    """

    kind: Literal["server"] = "server"
    url: str
    protocol: Literal["opd", "vllm", "sglang", "trl"] = "opd"
    signal: Literal["hidden", "topk"] | None = None
    teacher_top_k: int = Field(16, ge=1, le=4096)
    model: str | None = None
    hidden_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    projected: bool = False
    concurrency: int = Field(4, ge=1)
    request_timeout_s: float = Field(120.0, gt=0)
    deadline_s: float = Field(60.0, gt=0)
    patience_s: float | None = Field(None, gt=0)
    tokenizer_name_or_path: str | None = None

    @model_validator(mode="after")
    def _check_signal(self) -> Self:
        if self.signal == "hidden" and self.protocol != "opd":
            raise ValueError(
                f"signal: must be 'topk' with protocol {self.protocol!r}, which sends no hidden "
                "states"
            )
        if self.model is not None and self.protocol != "vllm":
            raise ValueError("model: is for protocol 'vllm', other servers serve one model")
        if self.hidden_dtype is not None and self._sent != "hidden":
            raise ValueError("hidden_dtype: needs signal 'hidden'")
        if self.projected and self._sent != "hidden":
            raise ValueError("projected: needs signal 'hidden'")
        return self

    @property
    def _sent(self) -> str:
        return self.signal or ("hidden" if self.protocol == "opd" else "topk")

    @property
    def tells(self) -> frozenset[str]:
        """What an objective may ask for."""
        told = {"topk", "token_logprobs"}
        if self.protocol == "opd":
            told.add("given_tokens")
        if self._sent == "hidden":
            told |= {"hidden", "samples"}
        return frozenset(told)

    @property
    def takes_temperature(self) -> bool:
        """Whether its laws come at other temperatures than 1."""
        return self.protocol == "opd"

    def build(
        self, tokenizer: Any, *, device: str, vocab_size: int | None, workspace_bytes: int
    ) -> ServerTeacher:
        """Connect; nothing is asked before the first check."""
        settings: dict[str, Any] = {}
        if self.protocol == "opd":
            settings = {"law_size": vocab_size, "projected": self.projected}
            if self.hidden_dtype is not None:
                settings["hidden_dtype"] = self.hidden_dtype
        elif self.protocol == "vllm":
            settings = {"model": self.model}
        client = connect(
            self.protocol,
            self.url,
            vocab_size=vocab_size,
            concurrency=self.concurrency,
            request_timeout_s=self.request_timeout_s,
            deadline_s=self.deadline_s,
            **settings,
        )
        return ServerTeacher(
            client, self, device=device, vocab_size=vocab_size, workspace_bytes=workspace_bytes
        )


class ServerTeacher:
    """Laws as a client fetches them.

    Args:
        client: of the server.
        config: its section.
        device: where the laws are wanted.
        vocab_size: the prefix of the vocabulary that they are over; None: all of it.
        workspace_bytes: scratch memory of the fused kernels.
    """

    name = "teacher"
    judges_any_state: ClassVar[bool] = True
    # somebody else's, and unknown
    num_parameters: ClassVar[int] = 0

    def __init__(
        self,
        client: Client,
        config: ServerConfig,
        *,
        device: str = "cpu",
        vocab_size: int | None = None,
        workspace_bytes: int = 1 << 30,
    ) -> None:
        from opd.model import resolve_device

        self.client = client
        self._config = config
        self._device = resolve_device(device)
        self._vocab_size = vocab_size
        self._moved_head: Head | None = None
        # called ten times a second while an answer is waited for; may raise
        self.on_wait: Callable[[], None] = lambda: None
        self._workspace_bytes = workspace_bytes

    @property
    def fingerprint(self) -> str | None:
        """Of the weights, where the server says so."""
        return self.client.info().fingerprint

    @property
    def max_positions(self) -> int | None:
        """Tokens that a sequence may have, where the server says so."""
        return self._patiently(self.client.info).max_length

    def close(self) -> None:
        """Let go of the connections."""
        self.client.close()

    def check_fits(self, student: Any, tokenizer: Any) -> None:
        """Compare its vocabulary with the student's; a server that is not up yet is waited for.

        Args:
            student: None where the teacher's tokens are its own, those of `tokenizer`.
            tokenizer: of the laws.

        Raises:
            TeacherRefused: they differ in size or in tokens.
            TeacherUnavailable: no answer within `patience_s`.
        """
        for doubt in self._patiently(lambda: self.client.check(tokenizer)):
            _log.warning("%s", doubt)
        theirs = self._patiently(self.client.info).vocab_size
        ours = theirs if student is None else student.lm_head_weight.shape[0]
        if self._vocab_size is None and theirs is not None and theirs != ours:
            raise TeacherRefused(
                f"teacher.url: the teacher's law is over {theirs} tokens and the student's over "
                f"{ours}; if only their padding differs, set "
                f"vocab_size={min(len(tokenizer), ours, theirs)}"
            )
        # what comes back must lie within the vocabulary of the law, whatever the server has
        self.client.vocab_size = self._vocab_size or ours
        if self._config.protocol != "opd":
            from opd.clients.probe import probe

            # rows that are off by one train without a word
            size = self._vocab_size or len(tokenizer)
            self._patiently(lambda: probe(self.client, vocab_size=size, num_topk=1))

    def law(self, batch: Batch) -> Law | SparseLaw:
        """Its next-token law at the trained positions, fetched when first asked for."""
        if "hidden" in self._config.tells:
            return Law(
                lambda: self._hidden(batch),
                self.head,
                vocab_size=self._vocab_size,
                workspace_bytes=self._workspace_bytes,
            )
        return SparseLaw(
            lambda num_topk, token_ids, temperature: self._topk(
                batch, num_topk, token_ids, temperature
            ),
            source=f"the server at {self._config.url}",
            num_topk=self._config.teacher_top_k,
            temperature=None if self._config.takes_temperature else 1.0,
        )

    @property
    def vocab_size(self) -> int | None:
        """The prefix of the vocabulary that its laws are over; None: all of it."""
        return self._vocab_size

    @property
    def head(self) -> Head:
        """What turns the hidden states that it sends into logits, fetched once."""
        if self._moved_head is None:
            head = self._patiently(self.client.head)
            bias = None if head.bias is None else head.bias.to(self._device)
            self._moved_head = replace(head, weight=head.weight.to(self._device), bias=bias)
        return self._moved_head

    def _hidden(self, batch: Batch) -> Tensor:
        scores = self._score(batch, signal="hidden")
        rows = gather_rows(scores, batch.completion_rows(), ["hidden"])["hidden"]
        return rows.to(self._device, self.head.weight.dtype)

    def _topk(
        self, batch: Batch, num_topk: int, token_ids: Tensor | None, temperature: float
    ) -> TopkRows:
        kept = batch.completion_rows()
        asked: dict[str, Any] = {"signal": "topk", "num_topk": num_topk}
        own = token_ids is not None and torch.equal(token_ids[:, 0].cpu(), batch.token_ids.cpu())
        if token_ids is not None and not (own and token_ids.shape[1] == 1):
            asked["query_ids"] = _spread(batch, kept, token_ids.cpu())
        scores = self._score(batch, temperature=temperature, **asked)

        names = ["ids", "logprobs", "tail_logprob", "entropy"]
        names += [] if token_ids is None else ["token_logprobs"]
        return TopkRows(**gather_rows(scores, kept, names)).to(self._device)

    def _score(self, batch: Batch, *, signal: Signal, **asked: Any) -> list[Scores]:
        """Scores of all sequences; waits for a server that does not answer."""
        sequences, starts = batch.sequences(), list(batch.prompt_lengths)
        queries = asked.pop("query_ids", None)
        done: list[Scores | None] = [None] * len(sequences)

        def missing() -> list[int]:
            return [i for i, score in enumerate(done) if score is None]

        def ask() -> list[Scores]:
            if not missing():
                return []
            some = {} if queries is None else {"query_ids": [queries[i] for i in missing()]}
            return self.client.score(
                [sequences[i] for i in missing()],
                [starts[i] for i in missing()],
                signal=signal,
                **some,
                **asked,
            )

        def keep(error: TeacherUnavailable) -> str:
            some = error.results or [None] * len(missing())
            for i, score in zip(missing(), some, strict=True):
                done[i] = score
            return f", {len(done) - len(missing())} of {len(done)} completions are scored and kept"

        answered = self._patiently(ask, keep)
        for i, score in zip(missing(), answered, strict=True):
            done[i] = score
        return [score for score in done if score is not None]

    def _patiently(
        self, ask: Callable[[], Any], keep: Callable[[TeacherUnavailable], str] = lambda error: ""
    ) -> Any:
        """What `ask` returns, asked again for as long as nobody answers and the patience lasts.

        Args:
            ask: a call of the client.
            keep: called with the error of a call: takes what was answered, returns words for it.
        """
        last_answer = time.monotonic()
        while True:
            try:
                return self._looking_up(ask)
            except TeacherUnavailable as error:
                if any(score is not None for score in error.results):
                    last_answer = time.monotonic()
                patience = self._config.patience_s
                if patience is not None and time.monotonic() - last_answer >= patience:
                    raise
                _log.warning("%s; training waits and asks again%s", error, keep(error))
                self.on_wait()

    def _looking_up(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns; `on_wait` is called meanwhile, as a signal must not wait for it."""
        (future,) = daemons.start([ask])
        while not wait([future], _LOOK_S).done:
            self.on_wait()
        return future.result()


def _spread(batch: Batch, kept: Sequence[Tensor], token_ids: Tensor) -> list[Tensor]:
    """Ids of the trained rows [T, J] as one [C, J] per trajectory, -1 where nothing is trained."""
    spread = []
    begin = 0
    for length, prompt_length, rows in zip(batch.lengths, batch.prompt_lengths, kept, strict=True):
        ids = torch.full((length - prompt_length, token_ids.shape[1]), -1, dtype=torch.int32)
        ids[rows] = token_ids[begin : begin + len(rows)].int()
        begin += len(rows)
        spread.append(ids)
    return spread
