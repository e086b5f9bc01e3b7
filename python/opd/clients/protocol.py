# SPDX-License-Identifier: Apache-2.0
"""What every client of a teacher server takes and gives. `opd.clients` says it in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from opd.batch import Head
from opd.schema import ConfigError

Signal = Literal["topk", "token_logprobs", "hidden"]
SIGNALS: tuple[Signal, ...] = ("topk", "token_logprobs", "hidden")


class TeacherError(RuntimeError):
    """Something is wrong between this process and a teacher server."""


class TeacherRefused(TeacherError, ConfigError):
    """A call or a set-up that cannot work, whoever tries it again."""


class BadReply(TeacherError):
    """A reply that is no law of the tokens that were sent."""


class ServerFault(BadReply):
    """The server failed at the same request again and again, while it answers as such."""


class TeacherUnavailable(TeacherError):
    """No answer until the deadline.

    Attributes:
        results: of `score`, one per sequence; None where there is none yet.
    """

    def __init__(self, message: str, results: Sequence[Scores | None] = ()) -> None:
        super().__init__(message)
        self.results = list(results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a teacher says of one completion of C tokens; row t is the law of its token t.

    Attributes:
        token_ids: [C] int32, the completion.
        ids: [C, K] int32, the likeliest tokens, best first; -1: no further one is known.
        logprobs: [C, K] float32 of the ids, nats; -inf beside -1.
        tail_logprob: [C] float32, log of the mass outside the ids; -inf: none.
        entropy: [C] float32, of the whole law, where the server gives it.
        token_logprobs: [C, J] float32, of `query_ids`, else of `token_ids` (J = 1).
        hidden: [C, D], final hidden states in the dtype of `Client.head()`.
        logit_error: [C] float32, no logit is off by more than this because `hidden` is projected.
    """

    token_ids: Tensor
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    tail_logprob: Tensor | None = None
    entropy: Tensor | None = None
    token_logprobs: Tensor | None = None
    hidden: Tensor | None = None
    logit_error: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """What a server says of itself; None is what it does not say.

    Attributes:
        model: name of the served model.
        vocab_size: tokens of its laws.
        max_length: tokens of a sequence.
        max_topk: K of a request.
        tokenizer_hash: `opd.identity.tokenizer_hash`.
        fingerprint: `opd.identity.model_fingerprint`.
        signals: what it can be asked for.
        takes_temperature: whether it can be asked for temperatures other than 1.
    """

    model: str | None = None
    vocab_size: int | None = None
    max_length: int | None = None
    max_topk: int | None = None
    tokenizer_hash: str | None = None
    fingerprint: str | None = None
    signals: frozenset[str] = frozenset({"topk", "token_logprobs"})
    takes_temperature: bool = False


class Client(Protocol):
    """A teacher server, as the loop sees it."""

    def info(self) -> TeacherInfo:
        """What the server says of itself, asked once."""
        ...

    def check(self, tokenizer: Any) -> list[str]:
        """Refuse a server of another vocabulary; returns what it gives no means to check."""
        ...

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
        """One `Scores` per sequence."""
        ...

    def head(self) -> Head:
        """What makes logits of hidden states, where the server sends these."""
        ...

    def close(self) -> None:
        """Let go of the connections."""
        ...
