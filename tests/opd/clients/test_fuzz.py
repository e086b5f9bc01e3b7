# SPDX-License-Identifier: Apache-2.0
"""10,000 damaged replies and requests: an error in words each time, or the right law.

A damaged reply of ours is always seen, by its checksum. The formats of others have none, so a digit
that became another digit is a law like any other; what is held there is that whatever passes is a
law of the right shape, and that nothing but the package's own errors is raised.
"""

from __future__ import annotations

import json
import random

import httpx2
import pytest
import torch

from opd.clients import BadReply, TeacherError, connect
from opd.clients.http_client import Ask, Item
from opd.clients.transport import Damaged
from opd.server.requests import Limits, RequestError, parse_request
from opd.wire import CONTENT_TYPE, pack
from tests.opd.clients.conftest import VOCAB_SIZE
from tests.opd.clients.test_opd_server import answering

K = 4
IDS = [torch.tensor([5, 9, 11, 2, 30, 7]), torch.tensor([3, 4, 8])]
STARTS = [2, 1]
ASK = Ask("topk", K, 1.0)


def damage(data: bytes, source: random.Random) -> bytes:
    """Bits flipped, bytes replaced, cut, doubled, or a part left out."""
    kind = source.randrange(6)
    bad = bytearray(data)
    place = source.randrange(len(bad))
    if kind == 0:
        bad[place] ^= 1 << source.randrange(8)
    elif kind == 1:
        for _ in range(source.randrange(1, 20)):
            bad[source.randrange(len(bad))] = source.randrange(256)
    elif kind == 2:
        del bad[place:]
    elif kind == 3:
        bad[place:place] = bad[place : place + source.randrange(1, 60)]
    elif kind == 4:
        del bad[place : place + source.randrange(1, 60)]
    else:
        # a character that JSON knows: quotes, brackets, signs, digits
        bad[place] = source.choice(b'"[]{}:,-+.eE0123456789 ntf\\')
    return bytes(bad)


def record(build, path):
    """One good reply: (client, its body), by way of a transport that keeps it."""
    kept = {}

    def keep(transport):
        def handle(request):
            reply = transport.handle_request(request)
            kept[request.url.path] = reply.read()
            return reply

        return httpx2.MockTransport(handle)

    client = build(keep)
    good = client.score(IDS, STARTS, num_topk=K)
    return client, kept[path], good


def replay(client, bodies):
    """What the client makes of each body, in place of the network."""
    items = [
        Item(i, ids, start, None) for i, (ids, start) in enumerate(zip(IDS, STARTS, strict=True))
    ]
    for body in bodies:

        def call(method, path, *, parse, body=body, **rest):
            return parse(body, {})

        client.transport.call = call
        try:
            yield body, client._score_part(items, ASK, None)
        except TeacherError as error:
            assert str(error)
            yield body, error


def is_law(scores) -> bool:
    """The shape and the sums of a law."""
    rows = len(scores.token_ids)
    mass = scores.logprobs.double().exp().sum(1)
    return (
        scores.ids.shape == scores.logprobs.shape == (rows, K)
        and scores.token_logprobs.shape == (rows, 1)
        and bool((mass <= 1.001).all())
        and bool(((scores.ids >= -1) & (scores.ids < VOCAB_SIZE)).all())
        and torch.equal(scores.ids == -1, scores.logprobs == -torch.inf)
        and not bool(scores.token_logprobs.isnan().any() | scores.tail_logprob.isnan().any())
        and bool((scores.token_logprobs <= 1e-3).all())
    )


def test_damaged_replies_of_ours_are_always_seen(engine):
    transport = answering(engine, lambda body: body)

    def build(keep):
        return connect("opd", "http://127.0.0.1", concurrency=1, transport=keep(transport))

    client, body, good = record(build, "/v1/topk")
    source = random.Random(0)
    bad = [damage(body, source) for _ in range(3000)]
    seen = 0
    for sent, found in replay(client, [body, *bad]):
        if sent == body:
            same = [torch.equal(a.logprobs, b.logprobs) for a, b in zip(found, good, strict=True)]
            assert all(same)
            continue
        assert isinstance(found, Damaged), found
        seen += 1
    assert seen > 2500


@pytest.mark.parametrize(
    ("kind", "settings", "path", "number"),
    [
        ("vllm", {}, "/v1/completions", 1000),
        ("sglang", {}, "/generate", 1000),
        ("sglang", {"flat": False}, "/generate", 1000),
        ("trl", {}, "/get_sequence_logprobs/", 1000),
        ("trl", {"response_format": "json"}, "/get_sequence_logprobs/", 1000),
    ],
)
def test_damaged_replies_of_others_are_errors_or_laws(fake, kind, settings, path, number):
    _, server = fake(kind)

    def build(keep):
        return connect(
            kind,
            "http://teacher:1",
            vocab_size=VOCAB_SIZE,
            concurrency=1,
            transport=keep(server.transport()),
            **settings,
        )

    client, body, _ = record(build, path)
    source = random.Random(1)
    errors = 0
    for _sent, found in replay(client, [damage(body, source) for _ in range(number)]):
        if isinstance(found, TeacherError):
            errors += 1
        else:
            assert len(found) == len(IDS)
            assert all(scores is None or is_law(scores) for scores in found)
    # most damage is seen; what is not hit spaces, texts, or one digit of a number
    assert errors > number // 3


def nonsense(source: random.Random, depth: int = 0):
    """A JSON value of any kind."""
    kind = source.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [nonsense(source, depth + 1) for _ in range(source.randrange(4))]
    if kind == 8:
        return {str(source.randrange(9)): nonsense(source, depth + 1) for _ in range(2)}
    return source.choice(
        [None, True, -1, 0, 7, 1 << 70, -1e308, 0.5, float("nan"), float("inf"), "", "3", "x"]
    )


def mutate(value, source: random.Random):
    """The value with one part of it replaced by nonsense."""
    if isinstance(value, dict) and value and source.random() < 0.9:
        key = source.choice(list(value))
        return value | {key: mutate(value[key], source)}
    if isinstance(value, list) and value and source.random() < 0.9:
        place = source.randrange(len(value))
        return [mutate(v, source) if i == place else v for i, v in enumerate(value)]
    return nonsense(source)


@pytest.mark.parametrize(
    ("kind", "settings", "path"),
    [
        ("vllm", {}, "/v1/completions"),
        ("sglang", {}, "/generate"),
        ("sglang", {"flat": False}, "/generate"),
        ("trl", {"response_format": "json"}, "/get_sequence_logprobs/"),
    ],
)
def test_well_formed_replies_of_the_wrong_kind(fake, kind, settings, path):
    _, server = fake(kind)

    def build(keep):
        return connect(
            kind,
            "http://teacher:1",
            vocab_size=VOCAB_SIZE,
            concurrency=1,
            transport=keep(server.transport()),
            **settings,
        )

    client, body, _ = record(build, path)
    source = random.Random(2)
    value = json.loads(body)
    bodies = [json.dumps(mutate(value, source)).encode() for _ in range(250)]
    for _sent, found in replay(client, bodies):
        if not isinstance(found, BadReply):
            assert all(scores is None or is_law(scores) for scores in found)


LIMITS = Limits(vocab_size=40, input_size=45, max_length=10, hidden_rank=2, hidden_size=8)


def test_damaged_requests_are_refused_with_a_status():
    source = random.Random(3)
    body = pack(
        {
            "token_ids": torch.arange(9, dtype=torch.int32),
            "lengths": torch.tensor([5, 4], dtype=torch.int32),
            "starts": torch.tensor([2, 1], dtype=torch.int32),
        },
        {"num_topk": 5, "temperature": 1.0},
    )
    for _ in range(1000):
        bad = damage(body, source)
        if bad == body:
            continue
        with pytest.raises(RequestError) as caught:
            parse_request(bad, content_type=CONTENT_TYPE, signal="topk", limits=LIMITS)
        assert caught.value.status == 400


def test_any_json_is_a_request_or_is_refused():
    source = random.Random(4)
    value = {
        "sequences": [[1, 2, 3], [4, 5]],
        "starts": [1, 1],
        "num_topk": 5,
        "query_ids": [[[1], [2]], [[3]]],
    }
    for number in range(1000):
        text = json.dumps(mutate(value, source)).encode()
        body = damage(text, source) if number % 2 else text
        try:
            request = parse_request(
                body, content_type="application/json", signal="topk", limits=LIMITS
            )
        except RequestError as error:
            assert error.status in (400, 413, 422)
        else:
            assert all(0 <= int(ids.min()) <= int(ids.max()) < 45 for ids in request.sequences)
            assert 1 <= request.num_topk <= 40
