# SPDX-License-Identifier: Apache-2.0
"""What holds for the clients of vLLM, SGLang and TRL alike; the numbers are those of the model."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2
import pytest
import tenacity
import torch

import opd_kernels as opk
from opd.clients import (
    BadReply,
    ServerFault,
    TeacherInfo,
    TeacherRefused,
    TeacherUnavailable,
    connect,
    daemons,
)
from opd.clients.transport import Damaged, Deadline, Transport
from opd.schema import ConfigError
from tests.opd.clients.conftest import VOCAB_SIZE

VARIANTS = (
    ("vllm", {}),
    ("vllm", {"endpoint": "generate"}),
    ("sglang", {}),
    ("sglang", {"flat": False}),
    ("trl", {}),
    ("trl", {"response_format": "json"}),
)
K = 6


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join([v[0], *map(str, v[1].values())]))
def variant(request):
    return request.param


def test_rows_are_those_of_the_model(fake, variant, sequences, starts, laws):
    client, server = fake(variant[0], client=variant[1])
    scores = client.score(sequences, starts, num_topk=K)
    assert len(scores) == len(sequences)
    for found, law, ids, start in zip(scores, laws, sequences, starts, strict=True):
        best = law.topk(K)
        assert torch.equal(found.token_ids, ids[start:].int())
        assert torch.equal(found.ids, best.indices.int())
        assert found.ids.dtype == torch.int32 and found.logprobs.dtype == torch.float32
        torch.testing.assert_close(found.logprobs, best.values, rtol=0, atol=2e-6)
        own = law.gather(1, ids[start:, None])
        torch.testing.assert_close(found.token_logprobs, own, rtol=0, atol=2e-6)
        rest = law.scatter(1, best.indices, -torch.inf).logsumexp(1)
        torch.testing.assert_close(found.tail_logprob, rest, rtol=1e-3, atol=1e-4)
    assert all(body is None or "temperature" in str(body) for _, body in server.requests)


def test_token_logprobs_alone(fake, variant, sequences, starts, laws):
    client, _ = fake(variant[0], client=variant[1])
    scores = client.score(sequences, starts, signal="token_logprobs")
    for found, law, ids, start in zip(scores, laws, sequences, starts, strict=True):
        assert found.ids is None
        own = law.gather(1, ids[start:, None])
        torch.testing.assert_close(found.token_logprobs, own, rtol=0, atol=2e-6)


def test_student_equal_to_teacher_has_no_loss(fake, variant, sequences, starts, laws):
    client, _ = fake(variant[0], client=variant[1], max_logprobs=VOCAB_SIZE)
    for found, law in zip(client.score(sequences, starts, num_topk=VOCAB_SIZE), laws, strict=True):
        teacher = torch.full_like(law, -torch.inf).scatter(1, found.ids.long(), found.logprobs)
        if len(law):
            loss = opk.divergence(law, teacher, divergence="forward_kl")
            assert float(loss.abs().max()) < 1e-5


def test_a_token_outside_the_best_is_not_among_them(fake, variant, sequences, starts, laws):
    client, _ = fake(variant[0], client=variant[1])
    scores = client.score(sequences, starts, num_topk=1)
    outside = 0
    for found, law, ids, start in zip(scores, laws, sequences, starts, strict=True):
        assert found.ids.shape == (len(law), 1)
        assert torch.equal(found.ids[:, 0].long(), law.argmax(1))
        outside += int((law.argmax(1) != ids[start:]).sum())
    assert outside > 5


def test_only_empty_completions(fake, variant, sequences):
    client, _ = fake(variant[0], client=variant[1])
    (scores,) = client.score([sequences[0]], [len(sequences[0])], num_topk=K)
    assert scores.ids.shape == (0, K)
    assert scores.logprobs.shape == (0, K)
    assert scores.tail_logprob.shape == (0,) and scores.token_logprobs.shape == (0, 1)
    assert client.score([], []) == []


def test_other_temperatures_are_refused_before_anything_is_scored(fake, variant, sequences, starts):
    client, server = fake(variant[0], client=variant[1])
    with pytest.raises(TeacherRefused, match="temperature"):
        client.score(sequences, starts, num_topk=K, temperature=0.7)
    if variant[0] != "sglang":
        assert not any(body for _, body in server.requests)


def test_other_ids_and_hidden_states_are_refused(fake, variant, sequences, starts):
    client, _ = fake(variant[0], client=variant[1])
    queries = [
        torch.zeros(len(ids) - start, 2, dtype=torch.int64)
        for ids, start in zip(sequences, starts, strict=True)
    ]
    with pytest.raises(TeacherRefused, match="no other ids than the completion's own"):
        client.score(sequences, starts, query_ids=queries)
    own = [ids[start:, None] for ids, start in zip(sequences, starts, strict=True)]
    assert len(client.score(sequences, starts, num_topk=K, query_ids=own)) == len(sequences)
    with pytest.raises(TeacherRefused, match="does not send 'hidden'"):
        client.score(sequences, starts, signal="hidden")
    with pytest.raises(TeacherRefused, match="no hidden states"):
        client.head()


def test_an_id_beyond_the_students_vocabulary_is_refused(fake, variant, laws):
    # the teacher gives ids up to 44, the student has 20
    ids = torch.arange(1, 12)
    client, _ = fake(variant[0], client=variant[1], vocab_size=20, max_logprobs=VOCAB_SIZE)
    with pytest.raises(BadReply, match="and the student has 20 tokens"):
        client.score([ids], [3], num_topk=VOCAB_SIZE)


def test_logits_are_told_from_log_probabilities(fake, variant, sequences, starts):
    client, _ = fake(variant[0], client=variant[1], as_logits=True)
    with pytest.raises(BadReply, match="sends logits"):
        client.score(sequences, starts, num_topk=K)


def test_a_dead_server_is_waited_for_and_nothing_is_lost(fake, sequences, starts, caplog):
    client, server = fake("vllm", client={"deadline_s": 0.8, "max_tokens_per_request": 1})
    client.info()
    answered = []
    handle = server.answer

    def dies(path, body):
        if answered:
            raise httpx2.ConnectError("connection refused")
        answered.append(path)
        return handle(path, body)

    server.answer = dies
    with caplog.at_level("WARNING"), pytest.raises(TeacherUnavailable) as caught:
        client.score(sequences, starts, num_topk=K)
    message = str(caught.value)
    assert "http://teacher:1" in message and "0.8 s" in message and "cannot connect" in message
    done = [scores is not None for scores in caught.value.results]
    # the empty completion, and the one that was answered
    assert sum(done) == 2 and len(done) == 5
    assert "trying for" in caplog.text and "nothing is lost" in caplog.text
    server.answer = handle
    left = [i for i, is_done in enumerate(done) if not is_done]
    scores = client.score([sequences[i] for i in left], [starts[i] for i in left], num_topk=K)
    assert len(scores) == 3


def test_busy_servers_are_tried_again(fake, variant, sequences, starts):
    client, server = fake(variant[0], client=variant[1])
    client.info()
    server.failures = [
        httpx2.Response(503, text="starting"),
        httpx2.Response(429, headers={"retry-after": "0.1"}),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("gone"),
    ]
    assert len(client.score(sequences, starts, num_topk=K)) == 5
    assert not server.failures


def test_a_server_that_fails_at_a_request_again_and_again_is_not_asked_for_ever(
    fake, sequences, starts
):
    client, server = fake("vllm", client={"concurrency": 1})
    client.transport._wait = tenacity.wait_none()
    client.info()
    fault = httpx2.Response(500, text="out of memory")
    server.failures = [fault] * 7
    assert len(client.score(sequences, starts, num_topk=K)) == 5
    # only those in a row count: a restart may be what helped
    server.failures = ([fault] * 7 + [httpx2.Response(503)]) * 3
    assert len(client.score(sequences, starts, num_topk=K)) == 5
    server.failures, before = [fault] * 20, len(server.requests)
    with pytest.raises(ServerFault, match=r"failed 8 times in a row \(status 500, out of memory\)"):
        client.score(sequences, starts, num_topk=K)
    assert len(server.requests) == before + 8


def test_slow_faults_are_counted_over_calls(fake):
    client, server = fake("vllm")
    transport = client.transport
    transport._wait = tenacity.wait_none()
    fault = httpx2.Response(500, text="out of memory")
    silence, busy = httpx2.ReadTimeout(""), httpx2.Response(503)

    def call(*replies):
        """Of so many tries, at the end of which the deadline is there."""
        server.failures, deadline = list(replies), Deadline(60)
        deadline.sleep = lambda _: None if server.failures else deadline.cancel()
        transport.call("POST", "/v1/completions", deadline=deadline, content=b"{}")

    # silence says neither that it works nor that it fails
    for replies in ((fault, fault, fault), (fault, silence), (silence,), (fault, fault, fault)):
        with pytest.raises(TeacherUnavailable):
            call(*replies)
    with pytest.raises(ServerFault, match="failed 8 times in a row"):
        call(fault, fault)
    # what was told is told, and 503 says that it is at it
    for _ in range(3):
        with pytest.raises(TeacherUnavailable):
            call(fault, fault, fault, busy, fault)


def test_ctrl_c_does_not_wait_for_requests_under_way(sequences, starts):
    """Nor does the end of the process, which waits for threads that are no daemons."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = connect("trl", url, deadline_s=60, max_tokens_per_request=1)
        client._info = TeacherInfo()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            client.score(sequences, starts, num_topk=K)
        assert time.monotonic() - begin < 2
        asking = [thread for thread in threading.enumerate() if thread.name.startswith("teacher")]
        assert len(asking) == 4 and all(thread.daemon for thread in asking)


def test_closing_ends_requests_under_way():
    """One that waits for a reply, and one that waits before its next try."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        transport = Transport(f"http://127.0.0.1:{silent.getsockname()[1]}")
        asleep = Deadline(60)
        calls = [
            partial(transport.call, "GET", "/", deadline=Deadline(60)),
            partial(transport.call, "GET", "/", deadline=asleep, parse=_damaged),
        ]
        transport._wait = tenacity.wait_fixed(60)
        once = transport._once

        def answers_one(*arguments):
            return (b"", httpx2.Response(200)) if arguments[2] is asleep else once(*arguments)

        transport._once = answers_one
        futures = daemons.start(calls, num_threads=2)
        time.sleep(0.5)
        assert not any(future.done() for future in futures)
        transport.close()
        for future in futures:
            assert isinstance(future.exception(timeout=3), TeacherUnavailable)


def _damaged(body, headers):
    raise Damaged("cut")


def test_what_the_server_takes_for_wrong_is_not_tried_again(fake, variant, sequences, starts):
    client, server = fake(variant[0], client=variant[1] | {"concurrency": 1})
    client.info()
    server.failures = [httpx2.Response(422, json={"detail": "no such field"})]
    before = len(server.requests)
    with pytest.raises(TeacherRefused, match="status 422: no such field"):
        client.score(sequences[:1], starts[:1], num_topk=K)
    assert len(server.requests) == before + 1


def test_a_wrong_token_names_the_variable_and_never_the_token(fake, sequences, starts, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "very-secret-token-1234")
    client, server = fake("vllm")
    client.info()
    server.failures = [httpx2.Response(401, text="no")]
    with pytest.raises(TeacherRefused, match="OPD_TEACHER_TOKEN") as caught:
        client.score(sequences[:1], starts[:1], num_topk=K)
    assert "very-secret" not in str(caught.value) and "very-secret" not in repr(client.__dict__)


def test_a_cut_reply_is_asked_for_again_and_then_refused(fake, variant, sequences, starts):
    client, server = fake(variant[0], client=variant[1])
    client.info()
    cut = [True]

    def once(reply):
        import json

        text = json.dumps(reply).encode()
        return text[: len(text) // 2] if cut.pop() else text

    cut[:] = [False] * 20 + [True]
    server.edit = once
    assert len(client.score(sequences[:1], starts[:1], num_topk=K)) == 1
    cut[:] = [True] * 20
    with pytest.raises(BadReply, match=r"is not JSON.*three times"):
        client.score(sequences[:1], starts[:1], num_topk=K)


@pytest.mark.parametrize(
    ("sequences", "starts", "message"),
    [
        ([[1, 2]], [0], "must start between 1 and 2, got 0"),
        ([[1, 2]], [3], "must start between 1 and 2, got 3"),
        ([[1, 2]], [1, 1], "must be of one length, got 1, 2"),
        ([[1.0, 2.0]], [1], "must be \\[S\\] of ints"),
        ([[[1, 2]]], [1], "must be \\[S\\] of ints"),
        ([[1, 45]], [1], "has ids from 1 to 45, must be in \\[0, 45\\)"),
        ([[1, -1]], [1], "has ids from -1 to 1"),
    ],
)
def test_bad_calls(fake, sequences, starts, message):
    client, _ = fake("vllm")
    with pytest.raises(TeacherRefused, match=message):
        client.score([torch.tensor(ids) for ids in sequences], starts)


def test_refusals_are_errors_of_configuration(fake, sequences, starts):
    client, _ = fake("vllm")
    with pytest.raises(ConfigError):
        client.score(sequences, starts, signal="logits")
    with pytest.raises(ConfigError, match="num_topk must be in"):
        client.score(sequences, starts, num_topk=0)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("teacher:8000", "must look like http"),
        ("ftp://x", "must look like http"),
        ("http://user:secret-word@x", "user name or password"),
        ("http://x:99999", "in its URL"),
    ],
)
def test_bad_urls(url, message):
    with pytest.raises(TeacherRefused, match=message) as caught:
        connect("vllm", url)
    assert "secret-word" not in str(caught.value)


def test_tokens_of_files_end_in_a_newline_and_others_are_refused(fake, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "a-secret-of-a-file\n")
    client, _ = fake("vllm")
    assert client.info().model == "tiny"
    for bad in ("two words", "h\u00e9", "line\nbreak"):
        monkeypatch.setenv("OPD_TEACHER_TOKEN", bad)
        with pytest.raises(TeacherRefused, match="OPD_TEACHER_TOKEN: must be printable") as caught:
            fake("vllm")
        assert bad not in str(caught.value)


def test_unknown_kinds_are_met_with_the_nearest():
    with pytest.raises(TeacherRefused, match="did you mean 'sglang'"):
        connect("sgl", "http://x")


def test_a_silent_server_does_not_outlast_the_deadline():
    """One that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = connect("vllm", url, deadline_s=0.7)
        begin = time.monotonic()
        with pytest.raises(TeacherUnavailable, match="no reply in time"):
            client.score([torch.tensor([1, 2])], [1])
        assert time.monotonic() - begin < 3


def test_a_server_that_comes_up_late_is_found(engine):
    """As when teacher and student are started together."""
    from tests.opd.server.live import running

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = connect("opd", f"http://127.0.0.1:{port}", deadline_s=20)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.score, [torch.tensor([1, 2, 3])], [1], num_topk=4)
        time.sleep(0.5)
        assert not asked.done()
        with running(engine, port=port):
            assert asked.result()[0].ids.shape == (2, 4)


def test_a_server_without_https_is_no_dead_one():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        transport = Transport(f"https://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(TeacherRefused, match="answers without https; begin the URL with http:"):
            transport.call("GET", "/", deadline=Deadline(20))
        thread.join()


def test_a_certificate_that_is_not_accepted_is_no_dead_server():
    def answer(request):
        error = ssl.SSLCertVerificationError()
        error.verify_message = "self-signed certificate"
        raise httpx2.ConnectError("handshake") from error

    transport = Transport("https://teacher:1", transport=httpx2.MockTransport(answer))
    with pytest.raises(TeacherRefused, match=r"\(self-signed certificate\); set SSL_CERT_FILE"):
        transport.call("GET", "/", deadline=Deadline(20))


def test_a_path_that_is_not_there_says_what_may_be_wrong():
    answer = httpx2.MockTransport(lambda request: httpx2.Response(404, text="Not Found"))
    with pytest.raises(TeacherRefused, match=r"404: Not Found; is the URL that of another kind"):
        Transport("http://teacher:1/v1", transport=answer).call("GET", "/", deadline=Deadline(20))
