# SPDX-License-Identifier: Apache-2.0
"""What is special about SGLang: triples, flat and base64 arrays, start offsets, temperature."""

from __future__ import annotations

import math

import pytest
import torch

from opd.clients import BadReply, TeacherRefused
from tests.opd.clients.fakes import encode

K = 4
IDS = torch.tensor([5, 9, 11, 2, 30, 7])


def edited(change):
    """An edit of the meta_info of the first sequence."""

    def edit(reply):
        change(reply[0]["meta_info"])
        return reply

    return edit


@pytest.mark.parametrize("start", [1, 2, 5, 6])
@pytest.mark.parametrize("null_first", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_rows_are_counted_from_the_end(fake, start, null_first, flat):
    client, server = fake("sglang", client={"flat": flat})
    server.null_first = null_first
    (scores,) = client.score([IDS], [start], num_topk=K)
    law = server.law(IDS.tolist())[start:]
    assert scores.ids.shape == (6 - start, K)
    if start < 6:
        assert torch.equal(scores.ids.long(), law.topk(K).indices)
        assert [body for _, body in server.requests][-1]["logprob_start_len"] == [start - 1]


def test_flat_arrays_without_base64(fake):
    client, server = fake("sglang")

    def plain(meta):
        name = "input_top_logprobs"
        ids = server.law(IDS.tolist())[1:].topk(K)
        for key in [key for key in meta if "b64" in key]:
            del meta[key]
        meta[f"{name}_val_flat"] = ids.values.flatten().tolist()
        meta[f"{name}_idx_flat"] = ids.indices.flatten().tolist()

    server.edit = edited(plain)
    (scores,) = client.score([IDS], [1], num_topk=K)
    assert torch.equal(scores.ids.long(), server.law(IDS.tolist())[1:].topk(K).indices)


def test_temperature_is_taken_only_if_the_reply_says_so(fake):
    client, server = fake("sglang")
    server.echoes_temperature = True
    (scores,) = client.score([IDS], [2], num_topk=K, temperature=1.5)
    law = server.law(IDS.tolist(), 1.5)[2:]
    torch.testing.assert_close(scores.logprobs, law.topk(K).values, rtol=0, atol=1e-6)
    server.echoes_temperature = False
    with pytest.raises(TeacherRefused, match=r"does not say that it applied temperature 1\.5"):
        client.score([IDS], [2], num_topk=K, temperature=1.5)


def test_null_text_and_text_are_both_fine(fake):
    def with_text(meta):
        for triple in meta["input_token_logprobs"]:
            triple[2] = "x"
        meta["input_top_logprobs"] = [
            row and [[v, i] for v, i, _ in row] for row in meta["input_top_logprobs"]
        ]

    client, _ = fake("sglang", edit=edited(with_text), client={"flat": False})
    assert client.score([IDS], [1], num_topk=K)[0].ids.shape == (5, K)


def test_duplicates_and_short_rows(fake):
    def change(meta):
        row = meta["input_top_logprobs"][-1]
        row[1] = list(row[0])
        row[1][0] = -0.5
        row.pop()

    client, _ = fake("sglang", edit=edited(change), client={"flat": False})
    (scores,) = client.score([IDS], [1], num_topk=K)
    assert (scores.ids[-1] >= 0).tolist() == [True, True, False, False]
    assert scores.logprobs[-1, 2:].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("5 to 6 rows, got 4", lambda m: m.update(input_token_logprobs=[[-1.0, 7, None]] * 4)),
        ("5 to 6 rows, got NoneType", lambda m: m.pop("input_token_logprobs")),
        ("is of token 3, sent was", lambda m: m["input_token_logprobs"][2].__setitem__(1, 3)),
        ("must be \\[log-prob, id, text\\]", lambda m: m["input_token_logprobs"][2].append(1)),
        ("is no token id", lambda m: m["input_token_logprobs"][2].__setitem__(1, "11")),
        ("must be a number", lambda m: m["input_token_logprobs"][2].__setitem__(0, None)),
        ("NaN", lambda m: m["input_token_logprobs"][2].__setitem__(0, math.nan)),
        ("input_top_logprobs must have 6 rows", lambda m: m["input_top_logprobs"].pop()),
        ("at most 4 triples", lambda m: m["input_top_logprobs"].__setitem__(2, None)),
        (
            "at most 4 triples",
            lambda m: m["input_top_logprobs"][2].append([-9.0, 1, None]),
        ),
        (
            "the rows of the two lists are shifted",
            lambda m: (
                m["input_token_logprobs"][3].__setitem__(0, m["input_top_logprobs"][3][0][0] - 5)
                or m["input_top_logprobs"][3][0].__setitem__(1, 2)
            ),
        ),
    ],
)
def test_lists_that_are_no_law_of_these_tokens(fake, message, change):
    client, _ = fake("sglang", edit=edited(change), client={"flat": False})
    with pytest.raises(BadReply, match=message):
        client.score([IDS], [1], num_topk=K)


NAME = "input_top_logprobs"


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("must be 2 sizes", lambda m: m.update({f"{NAME}_shape": [6]})),
        ("must be 2 sizes", lambda m: m.update({f"{NAME}_shape": [6, -1]})),
        ("must be 2 sizes", lambda m: m.update({f"{NAME}_shape": [6, True]})),
        ("must have 6 rows of at most 4", lambda m: m.update({f"{NAME}_shape": [6, 5]})),
        ("must have 6 rows of at most 4", lambda m: m.update({f"{NAME}_shape": [7, 4]})),
        ("must have 6 rows of at most 4", lambda m: m.update({f"{NAME}_null_prefix": 9})),
        ("4 rows that are not null", lambda m: m.update({f"{NAME}_null_prefix": 2})),
        ("must have 80 bytes", lambda m: m.update({f"{NAME}_val_flat_b64": "AAAA"})),
        ("is not base64", lambda m: m.update({f"{NAME}_val_flat_b64": "?" * 108})),
        ("is not base64", lambda m: m.update({f"{NAME}_val_flat_b64": 7})),
        ("dtype must be one of", lambda m: m.update({f"{NAME}_val_flat_b64_dtype": "int8"})),
        ("must have 40 bytes", lambda m: m.update({f"{NAME}_val_flat_b64_dtype": "float16"})),
        (
            "NaN",
            lambda m: m.update({f"{NAME}_val_flat_b64": encode(torch.full((5, 4), math.nan))}),
        ),
        (
            "below 0",
            lambda m: m.update({f"{NAME}_idx_flat_b64": encode(torch.full((5, 4), -7).int())}),
        ),
        (
            "a token id is 45",
            lambda m: m.update({f"{NAME}_idx_flat_b64": encode(torch.full((5, 4), 45).int())}),
        ),
    ],
)
def test_arrays_that_are_no_law(fake, message, change):
    client, _ = fake("sglang", edit=edited(change))
    with pytest.raises(BadReply, match=message):
        client.score([IDS], [1], num_topk=K)


@pytest.mark.parametrize(
    "reply", [b"[]", b"{}", b"null", b'[{"text": "x"}, {"text": "x"}]', b'[{"meta_info": 3}]']
)
def test_replies_of_another_form(fake, reply):
    client, _ = fake("sglang", edit=lambda _: reply)
    with pytest.raises(BadReply, match=r"must have 1 results|no meta_info"):
        client.score([IDS], [1], num_topk=K)


def test_sequences_longer_than_the_context_are_explained(fake):
    client, _ = fake("sglang", max_length=5)
    with pytest.raises(TeacherRefused, match=r"larger --context-length.*longer than the model's"):
        client.score([IDS], [1], num_topk=K)


def test_aborted_sequences_are_asked_again(fake):
    times = [2]

    def abort(meta):
        if times[0]:
            times[0] -= 1
            meta["finish_reason"] = {"type": "abort", "message": "retracted"}

    client, _ = fake("sglang", edit=edited(abort))
    assert client.score([IDS], [1], num_topk=K)[0].ids.shape == (5, K)
    times[0] = 99
    with pytest.raises(BadReply, match="3 times in a row"):
        client.score([IDS], [1], num_topk=K)
