# SPDX-License-Identifier: Apache-2.0
"""What is special about TRL: padded arrays in base64, or lists by rank."""

from __future__ import annotations

import math

import pytest
import torch

from opd.clients import BadReply, TeacherRefused
from tests.opd.clients.fakes import encode

K = 4
IDS = torch.tensor([5, 9, 11, 2, 30, 7])


def test_padding_of_shorter_completions_is_not_taken_for_token_0(fake):
    client, server = fake("trl", client={"concurrency": 1})
    scores = client.score([IDS, IDS[:3]], [1, 2], num_topk=K)
    assert [found.ids.shape for found in scores] == [(5, K), (1, K)]
    assert server.requests[-1][1]["prompt_lengths"] == [1, 2]


def test_a_real_token_0_behind_padding_of_its_row_counts(fake):
    def change(reply):
        # the server writes NaN as -inf with id 0, or leaves both as they were
        values = torch.full((1, 5, K), -math.inf)
        ids = torch.zeros((1, 5, K), dtype=torch.int32)
        values[..., 1] = -0.1
        reply |= {"logprobs_b64": encode(values), "token_ids_b64": encode(ids)}
        return reply

    client, _ = fake("trl", edit=change)
    (scores,) = client.score([IDS], [1], num_topk=K)
    assert scores.ids.tolist() == [[0, -1, -1, -1]] * 5


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("must be 3 sizes", {"shape": [1, 5]}),
        ("must be of shape \\[1, 5, 4\\]", {"shape": [1, 4, 4]}),
        ("must be of shape", {"completion_lengths": [4]}),
        ("must be of shape", {"completion_lengths": None}),
        ("must have 80 bytes", {"logprobs_b64": encode(torch.zeros(19))}),
        ("is not base64", {"token_ids_b64": None}),
        ("actual_token_ids are not", {"actual_token_ids_b64": encode(torch.zeros(5).int())}),
        ("NaN", {"actual_logprobs_b64": encode(torch.full((5,), math.nan))}),
        ("which no law over", {"logprobs_b64": encode(torch.full((20,), -math.inf))}),
        ("sends logits", {"logprobs_b64": encode(torch.full((20,), 3.0))}),
        ("a token id is 99", {"token_ids_b64": encode(torch.full((20,), 99).int())}),
    ],
)
def test_arrays_that_are_no_law_of_these_tokens(fake, message, change):
    client, _ = fake("trl", edit=lambda reply: reply | change)
    with pytest.raises(BadReply, match=message):
        client.score([IDS], [1], num_topk=K)


def lists(change):
    def edit(reply):
        change(reply["logprob_token_ids"][0], reply["logprobs"][0])
        return reply

    return edit


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("logprob_token_ids must have 5 rows", lambda ids, values: ids.pop()),
        ("logprobs must have 5 rows", lambda ids, values: values.pop()),
        ("at most 5 ids", lambda ids, values: ids[1].pop()),
        ("at most 5 ids", lambda ids, values: (ids[1].extend([1] * 9), values[1].extend([-9] * 9))),
        ("no token id", lambda ids, values: ids[1].__setitem__(0, "5")),
        ("must be a number", lambda ids, values: values[1].__setitem__(0, None)),
        (
            "row 1 has no log-probability of its own token 11",
            lambda ids, values: ids.__setitem__(1, [i + 1 if i == 11 else i for i in ids[1]]),
        ),
    ],
)
def test_lists_that_are_no_law_of_these_tokens(fake, message, change):
    client, _ = fake("trl", edit=lists(change), client={"response_format": "json"})
    with pytest.raises(BadReply, match=message):
        client.score([IDS], [1], num_topk=K)


def test_another_format_is_refused(fake):
    with pytest.raises(TeacherRefused, match="'binary' or 'json'"):
        fake("trl", client={"response_format": "msgpack"})
