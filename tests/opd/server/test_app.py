# SPDX-License-Identifier: Apache-2.0
"""The endpoints on a real socket: tokens, hosts, limits, a full queue, clients that leave."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import pytest
import torch

from opd.clients import BadReply, TeacherRefused, TeacherUnavailable, connect
from opd.wire import CONTENT_TYPE, pack, unpack

IDS = torch.tensor([5, 9, 11, 2, 30])
TOKEN = "0123456789abcdef-secret"
HTTP = httpx2.Client(trust_env=False)


def body(num_topk=3):
    return pack(
        {
            "token_ids": IDS.int(),
            "lengths": torch.tensor([5], dtype=torch.int32),
            "starts": torch.tensor([2], dtype=torch.int32),
        },
        {"num_topk": num_topk},
    )


def post(url, path="/v1/topk", content=None, **headers):
    headers = {"content-type": CONTENT_TYPE} | {k.replace("_", "-"): v for k, v in headers.items()}
    content = body() if content is None else content
    return HTTP.post(url + path, content=content, headers=headers)


def get(url, path, **headers):
    return HTTP.get(url + path, headers=headers)


class Gate:
    """Holds an engine's batches until it is opened."""

    def __init__(self, engine, monkeypatch):
        self.opened = threading.Event()
        self.batches = []
        score = engine.score

        def wait(pieces):
            self.batches.append(len(pieces))
            assert self.opened.wait(10)
            return score(pieces)

        monkeypatch.setattr(engine, "score", wait)

    def wait_for_batch(self, number=1):
        end = time.monotonic() + 10
        while len(self.batches) < number:
            assert time.monotonic() < end
            time.sleep(0.002)


def metric(url, name):
    lines = get(url, "/metrics").text.splitlines()
    return [line for line in lines if line.startswith(name)]


def test_endpoints_and_their_errors(live, engine):
    url = live(engine)
    assert get(url, "/health").json() == {"status": "ok"}
    info = get(url, "/v1/info").json()
    assert (info["model"], info["vocab_size"], info["max_length"]) == ("tiny", 45, 64)
    few, all_and_more = (get(url, f"/v1/info?vocab_size={n}").json() for n in (44, 46))
    assert few["tokenizer_hash"] != all_and_more["tokenizer_hash"] == info["tokenizer_hash"]
    message = unpack(post(url).content)
    assert message.tensors["ids"].shape == (3, 3)
    for reply, status, words in (
        (get(url, "/v1/topk"), 405, "Method Not Allowed"),
        (get(url, "/v2"), 404, "Not Found"),
        (get(url, "/v1/head?projected=2"), 422, "projected must be 0 or 1"),
        (get(url, "/v1/info?vocab_size=0"), 422, "vocab_size must be a number of tokens, got '0'"),
        (post(url, content=b"x"), 400, "at least 24 bytes"),
        (post(url, content=body(46)), 422, "num_topk must be an integer in [1, 45], got 46"),
        (post(url, content_type="text/plain"), 415, "content-type must be"),
    ):
        assert reply.status_code == status
        assert words in reply.json()["error"]["message"]


def test_metrics_count_what_happened(live, engine):
    url = live(engine)
    for _ in range(3):
        post(url)
    post(url, content=b"x")
    counts = metric(url, "opd_requests_total")
    assert 'opd_requests_total{endpoint="/v1/topk",status="200"} 3.0' in counts
    assert 'opd_requests_total{endpoint="/v1/topk",status="400"} 1.0' in counts
    assert metric(url, "opd_rows_total") == ['opd_rows_total{signal="topk"} 9.0']
    assert metric(url, "opd_batch_tokens_sum") == ["opd_batch_tokens_sum 15.0"]
    assert metric(url, "opd_queued_requests ") == ["opd_queued_requests 0.0"]


def test_everything_but_health_needs_the_token(live, engine, monkeypatch, caplog):
    url = live(engine, token=TOKEN)
    assert get(url, "/health").status_code == 200
    wrong = (
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer \u00e9"},
    )
    for headers in wrong:
        raw = {k: v.encode("latin-1") for k, v in headers.items()}
        for path in ("/v1/info", "/metrics", "/v1/head"):
            reply = get(url, path, **raw)
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in reply.text
        assert post(url, **raw).status_code == 401
    assert get(url, "/v1/info", authorization=f"Bearer {TOKEN}").status_code == 200
    monkeypatch.setenv("OPD_TEACHER_TOKEN", TOKEN)
    assert len(connect("opd", url).score([IDS], [2], num_topk=3)) == 1
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "another")
    with pytest.raises(TeacherRefused, match="set OPD_TEACHER_TOKEN"):
        connect("opd", url).info()
    assert TOKEN not in caplog.text


def test_names_that_are_made_to_point_here_are_refused(live, engine):
    url = live(engine, hosts=("localhost", "127.0.0.1", "[::1]"))
    port = urlsplit(url).port
    assert get(url, "/v1/info").status_code == 200
    for name in (f"localhost:{port}", "[::1]:80", "LOCALHOST"):
        assert get(url, "/v1/info", host=name).status_code == 200
    for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert get(url, "/v1/info", host=name).status_code == 403


def raw(url, head, rest=b""):
    """A request by hand; what comes back until the server closes, or 2 s."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=2) as line:
        line.sendall(head.encode() + b"\r\n\r\n" + rest)
        found = b""
        try:
            while part := line.recv(65536):
                found += part
                if b"error" in found:
                    break
        except TimeoutError:
            pass
    return found.decode("latin-1")


HEAD = f"POST /v1/topk HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {CONTENT_TYPE}"


def test_bodies_have_a_limit_whether_they_say_so_or_not(live, engine):
    url = live(engine)
    assert "413" in raw(url, f"{HEAD}\r\ncontent-length: 99999999999")[:20]
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    assert "413" in raw(url, f"{HEAD}\r\ntransfer-encoding: chunked", chunk * 65)[:20]
    assert "400" in raw(url, f"{HEAD}\r\ncontent-length: x")[:20]
    # announced and never sent
    url = live(engine, body_timeout_s=0.3)
    assert "408" in raw(url, f"{HEAD}\r\ncontent-length: 1000", b"OPD")[:20]
    assert get(url, "/health").status_code == 200


def test_a_full_queue_is_429_and_the_client_comes_back(live, engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    url = live(engine, max_queue=2)
    with ThreadPoolExecutor(8) as pool:
        first = [pool.submit(post, url) for _ in range(2)]
        gate.wait_for_batch()
        end = time.monotonic() + 5
        while metric(url, "opd_queued_requests ") != ["opd_queued_requests 2.0"]:
            assert time.monotonic() < end
        reply = post(url)
        assert reply.status_code == 429 and 1 <= int(reply.headers["retry-after"]) <= 60
        with pytest.raises(TeacherUnavailable, match=r"status 429"):
            connect("opd", url, deadline_s=0.5).score([IDS], [2], num_topk=3)
        client = connect("opd", url, deadline_s=20)
        later = pool.submit(client.score, [IDS], [2], num_topk=3)
        time.sleep(0.1)
        gate.opened.set()
        assert [future.result().status_code for future in first] == [200, 200]
        assert len(later.result()) == 1


def test_work_of_a_client_that_left_is_dropped(live, engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    url = live(engine)
    parts = urlsplit(url)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url)
        gate.wait_for_batch()
        leaver = http.client.HTTPConnection(parts.hostname, parts.port)
        leaver.request("POST", "/v1/topk", body(), {"content-type": CONTENT_TYPE})
        end = time.monotonic() + 5
        while metric(url, "opd_queued_requests ") != ["opd_queued_requests 2.0"]:
            assert time.monotonic() < end
        leaver.close()
        while metric(url, "opd_cancelled_requests_total") != ["opd_cancelled_requests_total 1.0"]:
            assert time.monotonic() < end
        gate.opened.set()
        assert first.result().status_code == 200
    # the one that was under way, and none for the client that left
    assert gate.batches == [1]


def test_requests_of_many_clients_are_merged(live, engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    url = live(engine)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(post, url)
        gate.wait_for_batch()
        others = [pool.submit(post, url) for _ in range(8)]
        end = time.monotonic() + 5
        while metric(url, "opd_queued_requests ") != ["opd_queued_requests 9.0"]:
            assert time.monotonic() < end
        gate.opened.set()
        bodies = {future.result().content for future in [first, *others]}
    assert gate.batches == [1, 8]
    assert len(bodies) == 1


def test_what_goes_wrong_inside_is_not_told(live, engine, monkeypatch, caplog):
    def broken(pieces):
        raise RuntimeError("weights at /secret/path")

    monkeypatch.setattr(engine, "score", broken)
    url = live(engine)
    reply = post(url)
    assert reply.status_code == 500
    assert "secret" not in reply.text and "its log says how" in reply.text
    assert "/secret/path" in caplog.text
    assert get(url, "/health").status_code == 200


def test_heads_are_made_once(live, engine, monkeypatch):
    made = []
    tensors = engine.head_tensors
    monkeypatch.setattr(engine, "head_tensors", lambda **k: (made.append(k), tensors(**k))[1])
    url = live(engine)
    with ThreadPoolExecutor(4) as pool:
        bodies = {get_head.content for get_head in pool.map(lambda _: get(url, "/v1/head"), "abcd")}
    assert len(bodies) == 1 and len(made) == 1
    assert unpack(get(url, "/v1/head?projected=1").content).tensors["weight"].shape == (45, 8)


def test_json_replies_have_a_checksum(live, engine):
    import zlib

    url = live(engine)
    text = json.dumps({"sequences": [IDS.tolist()], "starts": [2], "num_topk": 3}).encode()
    reply = post(url, content=text, content_type="application/json")
    assert reply.headers["x-opd-crc32"] == f"{zlib.crc32(reply.content):08x}"
    (rows,) = reply.json()["results"]
    assert [len(row) for row in rows["ids"]] == [3, 3, 3]


def test_nothing_of_a_law_is_lost_at_low_temperatures(live, engine):
    """Log-probabilities below -9999, and zeros, in both forms."""
    url = live(engine)
    one, other = (
        connect("opd", url, wire=wire).score([IDS], [2], num_topk=45, temperature=1e-4)[0]
        for wire in ("binary", "json")
    )
    assert float(one.logprobs.min()) < -9999
    assert torch.equal(one.logprobs, other.logprobs) and torch.equal(one.ids, other.ids)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure(live, engine, caplog):
    url = live(engine)
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as line:
        line.sendall(f"{HEAD}\r\ncontent-length: 1000\r\n\r\nOPD".encode())
        time.sleep(0.1)
    end = time.monotonic() + 5
    while metric(url, "opd_cancelled_requests_total") != ["opd_cancelled_requests_total 1.0"]:
        assert time.monotonic() < end
    assert "failed" not in caplog.text


def test_a_law_of_nan_is_refused_in_both_forms(live, engine):
    with torch.no_grad():
        engine._model.lm_head_weight[7] = torch.nan
    url = live(engine)
    with pytest.raises(BadReply, match="NaN"):
        connect("opd", url).score([IDS], [2], num_topk=3)
    with pytest.raises(TeacherRefused, match="is NaN"):
        connect("opd", url, wire="json").score([IDS], [2], num_topk=3)


def test_a_head_that_could_not_be_made_is_made_again(live, engine, monkeypatch):
    tensors, fails = engine.head_tensors, [True]

    def once(**k):
        if fails:
            fails.pop()
            raise RuntimeError("no memory")
        return tensors(**k)

    monkeypatch.setattr(engine, "head_tensors", once)
    url = live(engine)
    assert get(url, "/v1/head").status_code == 500
    assert get(url, "/v1/head").status_code == 200


def test_many_clients_at_once_get_what_each_gets_alone(live, engine):
    url = live(engine, max_batch_tokens=64, max_queue=64)
    generator = torch.Generator().manual_seed(7)
    texts = [torch.randint(1, 45, (3 + n % 30,), generator=generator) for n in range(24)]
    client = connect("opd", url, vocab_size=45, deadline_s=30)
    plans = [
        ({"signal": "topk", "num_topk": 5, "temperature": 0.8}, "logprobs"),
        ({"signal": "token_logprobs"}, "token_logprobs"),
        ({"signal": "hidden"}, "hidden"),
    ]

    def ask(number):
        options, _ = plans[number % 3]
        return client.score([texts[number]], [1 + number % 2], **options)[0]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(24)))
    for number, found in enumerate(together):
        name = plans[number % 3][1]
        torch.testing.assert_close(
            getattr(found, name), getattr(ask(number), name), rtol=1e-4, atol=1e-5
        )


def test_bytes_that_are_no_http_leave_it_alive(live, engine):
    import random

    url = live(engine)
    parts = urlsplit(url)
    source = random.Random(0)
    good = f"{HEAD}\r\ncontent-length: {len(body())}\r\n\r\n".encode() + body()
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(source.randrange(1, 12)):
            bad[source.randrange(len(bad))] = source.randrange(256)
        with socket.create_connection((parts.hostname, parts.port)) as line:
            line.sendall(bytes(bad[: source.randrange(1, len(bad) + 1)]))
    assert post(url).status_code == 200
