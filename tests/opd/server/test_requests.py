# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch

from opd.server.requests import Limits, RequestError, parse_request
from opd.wire import CONTENT_TYPE, pack

LIMITS = Limits(
    vocab_size=40,
    input_size=45,
    max_length=10,
    max_topk=20,
    max_query_ids=3,
    max_request_tokens=30,
    max_sequences=4,
    max_reply_bytes=1 << 20,
    hidden_rank=2,
    hidden_size=8,
)


def binary(lengths=(4, 3), starts=(2, 1), meta=None, *, ids=None, queries=None, **tensors):
    total = sum(max(0, length) for length in lengths)
    parts = {
        "token_ids": torch.arange(total, dtype=torch.int32) % 40 if ids is None else ids,
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "starts": torch.tensor(starts, dtype=torch.int32),
    }
    if queries is not None:
        parts["query_ids"] = queries
    return pack(parts | tensors, meta or {})


def parse(body, signal="topk", content_type=CONTENT_TYPE, limits=LIMITS):
    return parse_request(body, content_type=content_type, signal=signal, limits=limits)


def parse_json(value, signal="topk"):
    return parse(json.dumps(value).encode(), signal, "application/json; charset=utf-8")


def test_a_binary_request():
    queries = torch.tensor([[1, -1], [2, 3], [4, 5], [6, 7]], dtype=torch.int32)
    meta = {"temperature": 0.5, "num_topk": 7, "vocab_size": 38}
    request = parse(binary(meta=meta, queries=queries))
    assert [ids.tolist() for ids in request.sequences] == [[0, 1, 2, 3], [4, 5, 6]]
    assert request.starts == [2, 1]
    assert [q.tolist() for q in request.query_ids] == [[[1, -1], [2, 3]], [[4, 5], [6, 7]]]
    assert (request.num_topk, request.temperature, request.vocab_size) == (7, 0.5, 38)
    assert (request.num_tokens, request.num_rows, request.is_json) == (7, 4, False)


def test_json_says_the_same():
    value = {"sequences": [[0, 1, 2, 3], [4, 5, 6]], "starts": [2, 1], "num_topk": 7}
    request = parse_json(value)
    same = parse(binary(meta={"num_topk": 7}))
    assert request.is_json
    for one, other in zip(request.sequences, same.sequences, strict=True):
        assert torch.equal(one, other)
    assert (request.starts, request.num_topk) == (same.starts, same.num_topk)


def test_defaults():
    request = parse(binary())
    assert (request.num_topk, request.temperature, request.vocab_size) == (20, 1.0, 40)
    assert parse(binary(), "hidden").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("status", "message", "changes"),
    [
        (422, "at most 10 fit", {"lengths": (11,), "starts": (1,)}),
        (422, r"starts\[0\] must be in \[1, 4\], got 0", {"starts": (0, 1)}),
        (422, r"starts\[1\] must be in \[1, 3\], got 4", {"starts": (1, 4)}),
        (422, "lengths must sum to", {"lengths": (4, -1), "starts": (1, 1)}),
        (422, "lengths must sum to", {"ids": torch.zeros(3, dtype=torch.int32)}),
        (422, "1 to 4 sequences, got 0", {"lengths": (), "starts": ()}),
        (413, "1 to 4 sequences, got 5", {"lengths": (2,) * 5, "starts": (1,) * 5}),
        (413, "at most 30 tokens, got 40", {"lengths": (10,) * 4, "starts": (1,) * 4}),
        (422, "ids must be in", {"ids": torch.full((7,), 45, dtype=torch.int32)}),
        (422, "ids must be in", {"ids": torch.full((7,), -1, dtype=torch.int32)}),
        (422, "the completion of sequence 0", {"ids": torch.full((7,), 41, dtype=torch.int32)}),
        (422, "num_topk must be", {"meta": {"num_topk": 21}}),
        (422, "num_topk must be", {"meta": {"num_topk": 0}}),
        (422, "num_topk must be", {"meta": {"num_topk": True}}),
        (422, "num_topk must be", {"meta": {"num_topk": 3.0}}),
        (422, "vocab_size must be", {"meta": {"vocab_size": 41}}),
        (
            422,
            r"num_topk must be an integer in \[1, 5\]",
            {"meta": {"vocab_size": 5, "num_topk": 6}, "ids": torch.ones(7, dtype=torch.int32)},
        ),
        (422, "temperature must be", {"meta": {"temperature": 0}}),
        (422, "temperature must be", {"meta": {"temperature": "1"}}),
        (422, "temperature must be", {"meta": {"temperature": 1e300}}),
        (422, "temperature must be", {"meta": {"temperature": True}}),
        (422, "unknown keys \\['top_k'\\]", {"meta": {"top_k": 5}}),
        (422, "query_ids must have 4 rows", {"queries": torch.zeros(3, 1, dtype=torch.int32)}),
        (422, "at most 3 query_ids", {"queries": torch.zeros(4, 4, dtype=torch.int32)}),
        (422, "query_ids: ids must be", {"queries": torch.full((4, 1), 40, dtype=torch.int32)}),
        (422, "query_ids: ids must be", {"queries": torch.full((4, 1), -2, dtype=torch.int32)}),
        (400, "must be torch.int32", {"queries": torch.zeros(4, 1)}),
        (400, "must be torch.int32", {"ids": torch.zeros(7)}),
    ],
)
def test_refused(status, message, changes):
    with pytest.raises(RequestError, match=message) as caught:
        parse(binary(**changes))
    assert caught.value.status == status


def test_prompts_may_have_ids_beyond_the_laws():
    ids = torch.tensor([44, 1, 2, 3, 44, 1, 2], dtype=torch.int32)
    assert parse(binary(ids=ids)).num_rows == 4
    # and completions too, if other ids are asked for
    ids = torch.tensor([1, 1, 2, 44, 4, 1, 2], dtype=torch.int32)
    queries = torch.zeros(4, 1, dtype=torch.int32)
    assert parse(binary(ids=ids, queries=queries)).num_rows == 4


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ("must be an object", []),
        ("list of lists", {"sequences": 5, "starts": []}),
        ("list of lists", {"starts": [1]}),
        ("list of integers", {"sequences": [[1, "2"]], "starts": [1]}),
        ("list of integers", {"sequences": [[1, True]], "starts": [1]}),
        ("list of integers", {"sequences": [[1, 1 << 70]], "starts": [1]}),
        ("list of integers", {"sequences": [[1, 2.0]], "starts": [1]}),
        ("starts must be", {"sequences": [[1, 2]]}),
        ("starts must have 1 items", {"sequences": [[1, 2]], "starts": [1, 1]}),
        ("equally many", {"sequences": [[1, 2, 3]], "starts": [1], "query_ids": [[[1], [1, 2]]]}),
        ("list of lists of ids", {"sequences": [[1, 2]], "starts": [1], "query_ids": 3}),
        (
            "query_ids of sequence 0 must have 2 rows",
            {"sequences": [[1, 2, 3], [1, 2]], "starts": [1, 1], "query_ids": [[[1]], [[1], [2]]]},
        ),
        ("unknown keys", {"sequences": [[1, 2]], "starts": [1], "prompt": "x"}),
    ],
)
def test_refused_json(message, value):
    with pytest.raises(RequestError, match=message):
        parse_json(value)


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_no_json(body):
    with pytest.raises(RequestError) as caught:
        parse(body, content_type="application/json")
    assert caught.value.status == 400


def test_other_content_types_are_refused():
    for kind in ("", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        with pytest.raises(RequestError, match="content-type must be") as caught:
            parse(binary(), content_type=kind)
        assert caught.value.status == 415
    with pytest.raises(RequestError, match="hidden states travel as"):
        parse_json({"sequences": [[1, 2]], "starts": [1]}, "hidden")


def test_projected_needs_a_rank():
    assert parse(binary(meta={"projected": True}), "hidden").is_projected
    bare = Limits(vocab_size=40, input_size=40, max_length=10)
    with pytest.raises(RequestError, match="without --hidden-rank"):
        parse(binary(meta={"projected": True}), "hidden", limits=bare)
    with pytest.raises(RequestError, match="projected must be true or false"):
        parse(binary(meta={"projected": 1}), "hidden")
    with pytest.raises(RequestError, match="dtype must be one of"):
        parse(binary(meta={"dtype": "int8"}), "hidden")


def test_replies_have_a_limit_that_is_known_before_the_work():
    small = Limits(vocab_size=40, input_size=40, max_length=10, max_reply_bytes=600)
    assert parse(binary(meta={"num_topk": 10}), limits=small).num_topk == 10
    with pytest.raises(RequestError, match="the reply would have") as caught:
        parse(binary(meta={"num_topk": 20}), limits=small)
    assert caught.value.status == 413
