# SPDX-License-Identifier: Apache-2.0
"""Clients of teacher servers: one protocol, one file per kind of server.

    client = connect("opd", "http://127.0.0.1:8642", vocab_size=151_936)
    client.check(tokenizer)                            # refuses another vocabulary, in words
    scores = client.score(sequences, starts, num_topk=64)

**What goes in.** `sequences`: B int tensors [S_b], prompt then completion, unpadded. `starts`: B
ints, the number of prompt tokens of each, 1 <= starts[b] <= S_b (S_b: an empty completion).

**What comes out.** B `Scores` in the order of the sequences, of C = S_b - starts[b] rows each. Row
t is the law of completion token t, sequences[b][starts[b] + t], given every token before it: no
shift is left to the caller. `signal` says what the rows hold:

| signal | filled | servers |
|---|---|---|
| "topk" | ids, logprobs, tail_logprob, token_logprobs; entropy where the server has it | all |
| "token_logprobs" | token_logprobs; entropy where the server has it | all |
| "hidden" | hidden [C, D], `client.head()` makes logits of it; logit_error if projected | opd |

`token_logprobs` are [C, J]: of `query_ids[b]` [C, J] (-1: no id), or of the completion's own
tokens, J = 1. Only the opd server takes other ids than those. All is on the CPU, float32, in nats,
detached, at the temperature that was asked for; a server that cannot apply one refuses all but 1.
Ids are int32, best first; a missing entry is id -1 with log-prob -inf, a zero probability is -inf.

**What can go wrong.** `TeacherRefused` (a ConfigError): the call or the set-up is wrong, and no
retry helps. `BadReply`: the server's numbers are no law, or of other tokens; a damaged transport is
retried first. `ServerFault`, a BadReply: status 500 to one request, eight times in a row; status
503 and refused connections are those of a server that is down. `TeacherUnavailable`: no answer
until the deadline; its `results` hold the sequences that are done and None for the others, so that
nothing is lost: score those again later.

A client is safe to use from several threads. To add a kind: a file with a subclass of
`http_client.HttpClient`, and its line in `KINDS`.
"""

from __future__ import annotations

from typing import Any

from opd.clients.protocol import (
    BadReply,
    Client,
    Scores,
    ServerFault,
    Signal,
    TeacherError,
    TeacherInfo,
    TeacherRefused,
    TeacherUnavailable,
)

# module and class, imported when asked for: httpx2 and tenacity take a moment
KINDS = {
    "opd": ("opd.clients.opd_server", "OpdClient"),
    "vllm": ("opd.clients.vllm", "VllmClient"),
    "sglang": ("opd.clients.sglang", "SglangClient"),
    "trl": ("opd.clients.trl", "TrlClient"),
}


def connect(kind: str, url: str, **settings: Any) -> Client:
    """A client of a server. Nothing is sent before its first call.

    Args:
        kind: "opd" | "vllm" | "sglang" | "trl".
        url: of the server, without a path.
        settings: of `http_client.HttpClient`, and those of the kind.

    Raises:
        TeacherRefused: no such kind, or a setting that is wrong.
    """
    from importlib import import_module

    from opd.schema import did_you_mean

    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise TeacherRefused(
            f"teacher server: the kind must be one of {', '.join(KINDS)}, got {kind!r}{hint}"
        )
    module, name = KINDS[kind]
    return getattr(import_module(module), name)(url, **settings)


__all__ = [
    "KINDS",
    "BadReply",
    "Client",
    "Scores",
    "ServerFault",
    "Signal",
    "TeacherError",
    "TeacherInfo",
    "TeacherRefused",
    "TeacherUnavailable",
    "connect",
]
