# SPDX-License-Identifier: Apache-2.0
"""What is special about vLLM: maps with string ids, a row for the token itself, limits."""

from __future__ import annotations

import math

import httpx2
import pytest
import torch

from opd.clients import BadReply, TeacherRefused
from tests.opd.clients.conftest import VOCAB_SIZE

K = 6
IDS = torch.tensor([5, 9, 11, 2, 30])


def rows_of(reply):
    return reply["choices"][0]["prompt_logprobs"]


def edited(change):
    """An edit of the first prompt's rows."""

    def edit(reply):
        change(rows_of(reply))
        return reply

    return edit


def test_the_request_is_what_vllm_takes(fake):
    client, server = fake("vllm")
    client.score([IDS, IDS[:3]], [2, 1], num_topk=K)
    bodies = [body for path, body in server.requests if path == "/v1/completions"]
    assert sorted(len(prompt) for body in bodies for prompt in body["prompt"]) == [3, 5]
    for body in bodies:
        assert body["prompt_logprobs"] == K and body["max_tokens"] == 1 and body["model"] == "tiny"
        # of a server that sends processed log-probs these are the raw ones
        assert body["temperature"] == 1.0 and body["top_p"] == 1.0 and body["top_k"] == -1


def test_sequences_share_a_request_up_to_the_tokens_of_one(fake):
    client, server = fake("vllm", client={"concurrency": 1, "max_tokens_per_request": 12})
    client.score([IDS] * 5, [2] * 5, num_topk=K)
    sizes = [len(body["prompt"]) for path, body in server.requests if body]
    assert sizes == [2, 2, 1]


def test_minus_9999_and_minus_infinity_are_zero_probability(fake):
    def change(rows):
        entries = list(rows[2].values())
        entries[-1]["logprob"] = -9999.0
        entries[-2]["logprob"] = -math.inf
        entries[-3]["logprob"] = -12345.0

    client, _ = fake("vllm", edit=edited(change))
    (scores,) = client.score([IDS], [1], num_topk=K)
    row = scores.ids[1]
    assert int((row == -1).sum()) >= 2
    assert torch.equal(row == -1, scores.logprobs[1] == -torch.inf)
    assert (scores.logprobs[0] > -torch.inf).all()


def test_fewer_entries_than_asked_for_are_padded(fake):
    def change(rows):
        token = str(int(IDS[2]))
        for key in [key for key in rows[2] if key != token][1:]:
            del rows[2][key]

    client, _ = fake("vllm", edit=edited(change))
    (scores,) = client.score([IDS], [1], num_topk=K)
    assert int((scores.ids[1] >= 0).sum()) == 2
    assert (scores.ids[0] >= 0).all()


def test_one_id_in_two_spellings_counts_once(fake):
    def change(rows):
        rows[2]["0" + next(iter(rows[2]))] = {"logprob": -0.001}

    client, _ = fake("vllm", edit=edited(change))
    plain, _ = fake("vllm")
    one, other = (c.score([IDS], [1], num_topk=K)[0] for c in (client, plain))
    assert torch.equal(one.ids, other.ids) and torch.equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("must have one row per token of the prompt, 5, got 4", lambda rows: rows.pop()),
        ("one row per token of the prompt, 5, got 6", lambda rows: rows.append(rows[-1])),
        ("the first row of prompt_logprobs must be null", lambda rows: rows.insert(0, rows.pop())),
        ("row 2 has no log-probability of its own token", lambda rows: rows[2].pop("11")),
        ("row 1: must map ids", lambda rows: rows.__setitem__(1, None)),
        ("row 1: must map ids", lambda rows: rows.__setitem__(1, [1, 2])),
        ("is no token id", lambda rows: rows[1].__setitem__("the", {"logprob": -1.0})),
        ("is no token id", lambda rows: rows[1].__setitem__("-3", {"logprob": -1.0})),
        ("must be a number", lambda rows: rows[1].__setitem__("3", {"logprob": "x"})),
        ("must be a number", lambda rows: rows[1].__setitem__("3", {"logprob": True})),
        ("must be a number", lambda rows: rows[1].__setitem__("3", {})),
        ("is NaN", lambda rows: rows[1]["9"].update(logprob=math.nan)),
        ("above 0: the server sends logits", lambda rows: rows[1]["9"].update(logprob=math.inf)),
        ("sum to", lambda rows: [e.update(logprob=-0.1) for e in rows[1].values()]),
        ("which no law over", lambda rows: [e.update(logprob=-20.0) for e in rows[1].values()]),
        (
            "entries, asked were the best 6",
            lambda rows: [rows[1].setdefault(str(i), {"logprob": -9.0}) for i in range(40)],
        ),
    ],
)
def test_rows_that_are_no_law_of_these_tokens(fake, message, change):
    client, _ = fake("vllm", edit=edited(change))
    with pytest.raises(BadReply, match=message):
        client.score([IDS], [1], num_topk=K)


def test_shifted_rows_show_by_the_tokens_own_id(fake):
    client, _ = fake("vllm", shift=1, max_logprobs=VOCAB_SIZE)

    def shift(reply):
        rows = rows_of(reply)
        rows[1:] = [*rows[2:], rows[-1]]
        return reply

    client, _ = fake("vllm", edit=shift)
    with pytest.raises(BadReply, match=r"no log-probability of its own token.*shifted"):
        client.score([IDS], [1], num_topk=2)


@pytest.mark.parametrize("endpoint", ["completions", "generate"])
def test_the_servers_limits_are_explained(fake, endpoint):
    client, _ = fake("vllm", client={"endpoint": endpoint})
    with pytest.raises(TeacherRefused, match=r"num_topk is 21.*start it with --max-logprobs 21"):
        client.score([IDS], [1], num_topk=21)
    with pytest.raises(TeacherRefused, match="64 tokens, and the server takes at most 63"):
        client.score([torch.ones(64, dtype=torch.int64)], [1], num_topk=2)
    client.info = lambda: None
    client._info = type(client._info)(model="tiny")
    with pytest.raises(TeacherRefused, match=r"larger --max-model-len.*maximum context length"):
        client.score([torch.ones(64, dtype=torch.int64)], [1], num_topk=2)


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_without_the_newer_endpoint(fake, status):
    client, server = fake("vllm", client={"endpoint": "generate"})
    server.answer = lambda path, body: (
        httpx2.Response(status, json={"detail": "Not Found"})
        if "generate" in path
        else {"data": [{"id": "tiny"}]}
    )
    with pytest.raises(TeacherRefused, match="set endpoint to 'completions'"):
        client.score([IDS], [1], num_topk=2)


def test_only_what_a_reply_leaves_out_is_asked_again(fake):
    client, server = fake("vllm", client={"concurrency": 1})
    sequences = [IDS, IDS[:4], IDS[:3]]

    def lose_one(reply):
        if len(reply["choices"]) == 3:
            del reply["choices"][1]
            reply["choices"].reverse()
        return reply

    server.edit = lose_one
    scores = client.score(sequences, [1, 1, 1], num_topk=K)
    assert [len(found.token_ids) for found in scores] == [4, 3, 2]
    prompts = [body["prompt"] for path, body in server.requests if body]
    assert prompts[1] == [IDS[:4].tolist()]


def test_a_server_that_sends_no_prompt_logprobs(fake):
    def forget(reply):
        for choice in reply["choices"]:
            choice["prompt_logprobs"] = None
        return reply

    client, _ = fake("vllm", edit=forget)
    with pytest.raises(BadReply, match="3 times in a row; does it send those of prompts"):
        client.score([IDS], [1], num_topk=2)


@pytest.mark.parametrize("index", [7, -1, 0, "0", None, True])
def test_choices_that_are_of_no_prompt(fake, index):
    def change(reply):
        reply["choices"][1]["index"] = index
        return reply

    client, _ = fake("vllm", edit=change, client={"concurrency": 1})
    with pytest.raises(BadReply, match="choices must have the indices 0 to 1 once each"):
        client.score([IDS, IDS], [1, 1], num_topk=2)


def test_another_model_and_another_tokenizer_are_refused(fake):
    client, _ = fake("vllm", client={"model": "other"})
    with pytest.raises(TeacherRefused, match="serves tiny, asked was other"):
        client.info()

    class Tokenizer:
        def __init__(self, *ids):
            self.ids = list(ids)

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": self.ids}

    client, _ = fake("vllm")
    assert client.check(Tokenizer(1, 2, 3)) == []
    with pytest.raises(TeacherRefused, match=r"\[1, 2, 3\] there and \[1, 2, 4\] here"):
        client.check(Tokenizer(1, 2, 4))


def test_a_server_without_tokenize_is_not_checked_and_says_so(fake):
    client, server = fake("vllm")
    server.failures = [httpx2.Response(404)]
    (line,) = client.check(None)
    assert "nothing checks that its tokens are the student's" in line
