# SPDX-License-Identifier: Apache-2.0
"""Our own server end to end: a real socket, the tiny teacher, every transport against the model."""

from __future__ import annotations

import httpx2
import pytest
import torch

import opd_kernels as opk
from opd.batch import Trajectory, collate
from opd.clients import BadReply, TeacherRefused, connect
from opd.wire import pack, unpack
from tests.opd.clients.conftest import VOCAB_SIZE

K = 6


@pytest.fixture
def url(live, engine):
    return live(engine)


@pytest.fixture
def client(url):
    client = connect("opd", url, vocab_size=VOCAB_SIZE, deadline_s=20)
    yield client
    client.close()


@pytest.fixture
def batch_of(sequences, starts):
    """The texts as the loop has them."""
    trajectories = [
        Trajectory(ids=ids, prompt_length=start, loss_mask=torch.arange(len(ids)) >= start)
        for ids, start in zip(sequences, starts, strict=True)
    ]
    return collate(trajectories, pad_id=0)


@pytest.mark.parametrize("wire", ["binary", "json"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rows_are_those_of_the_model(url, wire, temperature, sequences, starts, teacher):
    client = connect("opd", url, vocab_size=VOCAB_SIZE, wire=wire)
    scores = client.score(sequences, starts, num_topk=K, temperature=temperature)
    for found, ids, start in zip(scores, sequences, starts, strict=True):
        logits = teacher.model(ids[None]).logits[0, start - 1 : len(ids) - 1].detach()
        law = (logits / temperature).log_softmax(-1)
        best = law.topk(K)
        assert torch.equal(found.ids, best.indices.int())
        torch.testing.assert_close(found.logprobs, best.values, rtol=0, atol=1e-5)
        own = law.gather(1, ids[start:, None])
        torch.testing.assert_close(found.token_logprobs, own, rtol=0, atol=1e-5)
        entropy = -(law.exp() * law).sum(1)
        torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-5)
        rest = law.scatter(1, best.indices, -torch.inf).logsumexp(1)
        torch.testing.assert_close(found.tail_logprob, rest, rtol=1e-4, atol=1e-4)


def test_every_transport_gives_the_loss_of_the_local_teacher(
    client, batch_of, student, teacher, sequences, starts
):
    """One student, one teacher, three ways to bring them together."""
    hidden = student.hidden(batch_of).detach()
    weight = student.lm_head_weight.detach()
    local = teacher.law(batch_of)

    def loss(theirs, head):
        found = opk.fused_linear_divergence(
            hidden, weight, theirs, head.weight, divergence="forward_kl", reduction="none"
        )
        return found.loss

    expected = loss(local.hidden(), teacher.head)
    sent = client.score(sequences, starts, signal="hidden")
    got = loss(torch.cat([found.hidden for found in sent]), client.head())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    whole = client.score(sequences, starts, num_topk=VOCAB_SIZE)
    ids = torch.cat([found.ids for found in whole]).long()
    logprobs = torch.cat([found.logprobs for found in whole])
    law = torch.zeros_like(logprobs).scatter(1, ids, logprobs)
    from_topk = opk.divergence(hidden @ weight.T, law, divergence="forward_kl")
    torch.testing.assert_close(from_topk, expected, rtol=1e-4, atol=1e-5)

    ours = student.law(batch_of).token_logprobs(batch_of.token_ids).logprobs.detach()
    theirs = local.token_logprobs(batch_of.token_ids).logprobs
    sent = client.score(sequences, starts, signal="token_logprobs")
    remote = torch.cat([found.token_logprobs[:, 0] for found in sent])
    torch.testing.assert_close(ours - remote, ours - theirs, rtol=1e-5, atol=1e-5)


def test_a_student_equal_to_the_teacher_has_no_loss(client, batch_of, teacher, sequences, starts):
    sent = client.score(sequences, starts, signal="hidden")
    head = client.head()
    loss = opk.fused_linear_divergence(
        teacher.law(batch_of).hidden(),
        teacher.head.weight,
        torch.cat([found.hidden for found in sent]),
        head.weight,
        divergence="reverse_kl",
        reduction="none",
    ).loss
    assert float(loss.abs().max()) < 1e-6


def test_hidden_states_make_the_logits_of_the_model(client, url, sequences, starts, teacher):
    head = client.head()
    projected = connect("opd", url, projected=True)
    rounded = connect("opd", url, hidden_dtype="bfloat16", projected=True)
    for ids, start in zip(sequences, starts, strict=True):
        logits = teacher.model(ids[None]).logits[0, start - 1 : len(ids) - 1].detach()
        (found,) = client.score([ids], [start], signal="hidden")
        torch.testing.assert_close(head.logits(found.hidden), logits, rtol=1e-5, atol=1e-5)
        assert found.logit_error is None
        for other in (projected, rounded):
            (found,) = other.score([ids], [start], signal="hidden")
            assert found.hidden.shape == (len(ids) - start, 8)
            assert found.hidden.dtype == other.head().weight.dtype == torch.float32
            error = (other.head().logits(found.hidden) - logits).abs()
            # the bound holds for every logit, and is not empty
            assert (error <= found.logit_error[:, None]).all()
            assert not len(error) or float(found.logit_error.max()) < 20 * float(error.max())


def test_other_ids_are_scored_in_the_same_pass(client, sequences, starts, laws):
    queries = [
        torch.randint(-1, VOCAB_SIZE, (len(ids) - start, 3))
        for ids, start in zip(sequences, starts, strict=True)
    ]
    for signal in ("topk", "token_logprobs"):
        scores = client.score(sequences, starts, signal=signal, num_topk=K, query_ids=queries)
        for found, law, query in zip(scores, laws, queries, strict=True):
            expected = law.gather(1, query.clamp(min=0)).masked_fill(query < 0, -torch.inf)
            torch.testing.assert_close(found.token_logprobs, expected, rtol=0, atol=1e-5)
    wide = [torch.zeros(len(query), 5000, dtype=torch.int64) for query in queries]
    with pytest.raises(TeacherRefused, match="at most 4096 query_ids per position, got 5000"):
        client.score(sequences, starts, num_topk=K, query_ids=wide)


def test_laws_over_the_shared_prefix_of_padded_heads(url, sequences, starts, teacher):
    texts = [ids % 40 for ids in sequences]
    with pytest.raises(TeacherRefused, match="over 45 tokens and the student has 40"):
        connect("opd", url, vocab_size=40).info()
    client = connect("opd", url, vocab_size=40, law_size=40)
    for found, ids, start in zip(
        client.score(texts, starts, num_topk=40), texts, starts, strict=True
    ):
        logits = teacher.model(ids[None]).logits[0, start - 1 : len(ids) - 1].detach()
        best = logits[:, :40].log_softmax(-1).topk(40)
        torch.testing.assert_close(found.logprobs, best.values, rtol=0, atol=1e-5)
        assert not len(found.ids) or float(found.tail_logprob.max()) == -torch.inf
    with pytest.raises(TeacherRefused, match="has 45 tokens, got law_size 46"):
        connect("opd", url, law_size=46).info()


def test_the_vocabulary_is_checked_by_its_hash(client, tokenizer):
    class Other:
        def get_vocab(self):
            return {"a": 0}

    class More:
        def get_vocab(self):
            return {**tokenizer.get_vocab(), "added": 45, "w": 44}

    assert client.check(tokenizer) == []
    with pytest.raises(TeacherRefused, match=r"the first 45 tokens .* one vocabulary"):
        client.check(Other())
    with pytest.raises(TeacherRefused, match="the first 45 tokens"):
        client.check(More())
    # of which laws over fewer tokens know nothing
    assert connect("opd", client.url, law_size=44).check(More()) == []


def test_limits_are_refused_before_anything_is_sent(client):
    with pytest.raises(TeacherRefused, match="65 tokens, and the server takes at most 64"):
        client.score([torch.ones(65, dtype=torch.int64)], [1], num_topk=K)
    with pytest.raises(TeacherRefused, match="num_topk must be in \\[1, 45\\], got 46"):
        client.score([torch.ones(5, dtype=torch.int64)], [1], num_topk=46)


def test_settings_are_checked(url):
    for settings, message in (
        ({"wire": "xml"}, "wire must be one of"),
        ({"hidden_dtype": "int8"}, "hidden_dtype must be one of"),
        ({"concurrency": 0}, "must be above 0"),
    ):
        with pytest.raises(TeacherRefused, match=message):
            connect("opd", url, **settings)
    client = connect("opd", url, wire="json")
    with pytest.raises(TeacherRefused, match="binary format only"):
        client.score([torch.ones(4, dtype=torch.int64)], [1], signal="hidden")


def test_projected_needs_a_server_that_has_it(live, teacher):
    from opd.server.engine import Engine

    url = live(Engine(teacher, name="tiny"))
    client = connect("opd", url, projected=True)
    with pytest.raises(TeacherRefused, match="start it with --hidden-rank"):
        client.score([torch.ones(4, dtype=torch.int64)], [1], signal="hidden")
    with pytest.raises(TeacherRefused, match="start it with --hidden-rank"):
        client.head()
    (line,) = client.check(None)
    assert "came without a tokenizer" in line


def answering(engine, change, path="/v1/topk"):
    """A transport to the engine's application whose replies are changed."""
    import asyncio

    from opd.server.app import AppSettings, build_app

    app = build_app(engine, AppSettings())

    def handle(request):
        async def once():
            inner = httpx2.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx2.AsyncClient(transport=inner, base_url="http://127.0.0.1") as client,
            ):
                headers = {"content-type": request.headers.get("content-type", "")}
                method, where = request.method, request.url.path
                return await client.request(method, where, content=request.content, headers=headers)

        reply = asyncio.run(once())
        if request.url.path != path:
            return httpx2.Response(200, content=reply.content)
        return httpx2.Response(200, content=change(reply.content))

    return httpx2.MockTransport(handle)


def meta(**changes):
    def change(body):
        message = unpack(body)
        return pack(message.tensors, message.meta | changes)

    return change


def tensors(**changes):
    def change(body):
        message = unpack(body)
        found = {name: edit(message.tensors[name]) for name, edit in changes.items()}
        return pack(message.tensors | found, message.meta)

    return change


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("restarted with another model", meta(fingerprint="0" * 32)),
        ("has temperature 2.0, asked was 1.0", meta(temperature=2.0)),
        ("has signal 'hidden'", meta(signal="hidden")),
        ("has vocab_size 44", meta(vocab_size=44)),
        ("has request_crc32 5", meta(request_crc32=5)),
        ("must be torch.int32 of shape", tensors(ids=lambda t: t[:-1])),
        ("must be torch.int32 of shape", tensors(ids=lambda t: t.long())),
        ("a token id is 45", tensors(ids=lambda t: t + VOCAB_SIZE - t.max())),
        ("not distinct, or not the best first", tensors(ids=lambda t: t * 0)),
        ("not distinct, or not the best first", tensors(ids=lambda t: t * 0 - 1)),
        ("not distinct, or not the best first", tensors(logprobs=lambda t: t.flip(1))),
        ("sum to 1 with an error", tensors(tail_logprob=lambda t: t - 0.1)),
        ("sum to 1 with an error", tensors(logprobs=lambda t: t - 0.1)),
        ("NaN", tensors(tail_logprob=lambda t: t * float("nan"))),
        ("above 0", tensors(logprobs=lambda t: t + 5)),
        ("entropy is negative or not finite", tensors(entropy=lambda t: t - 100)),
    ],
)
def test_well_formed_replies_that_are_no_answer(engine, sequences, starts, message, change):
    transport = answering(engine, change)
    client = connect("opd", "http://127.0.0.1", vocab_size=VOCAB_SIZE, transport=transport)
    with pytest.raises(BadReply, match=message):
        client.score(sequences[:1], starts[:1], num_topk=K)


def test_a_head_that_is_none(engine):
    change = tensors(weight=lambda t: t * float("nan"))
    transport = answering(engine, change, "/v1/head")
    client = connect("opd", "http://127.0.0.1", transport=transport)
    with pytest.raises(BadReply, match="must be a head of 45 tokens on 24"):
        client.head()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("must be a head of 45 tokens on 24", tensors(weight=lambda t: t[:, :-1])),
        ("must be a head of 45 tokens on 24", tensors(weight=lambda t: t[:-1])),
        ("logit_scale 0", meta(logit_scale=0)),
        ("logit_scale 1", meta(logit_scale=10**400)),
        ("softcap 'x'", meta(softcap="x")),
        ("restarted with another model", meta(fingerprint=None)),
    ],
)
def test_heads_that_do_not_fit(engine, message, change):
    transport = answering(engine, change, "/v1/head")
    with pytest.raises(BadReply, match=message):
        connect("opd", "http://127.0.0.1", transport=transport).head()


def test_hidden_states_that_do_not_fit(engine, sequences, starts):
    for message, change in (
        ("must be torch.float32 of shape", tensors(hidden=lambda t: t[:, :-1])),
        ("not finite", tensors(hidden=lambda t: t * float("inf"))),
    ):
        transport = answering(engine, change, "/v1/hidden_states")
        client = connect("opd", "http://127.0.0.1", transport=transport)
        with pytest.raises(BadReply, match=message):
            client.score(sequences[:1], starts[:1], signal="hidden")


def test_another_kind_of_server_is_told_apart(fake):
    _, server = fake("vllm")
    server.answer = lambda path, body: {"data": []}
    client = connect("opd", "http://teacher:1", transport=server.transport(), deadline_s=2)
    with pytest.raises(BadReply, match="is this an `opd serve-teacher`"):
        client.info()


def test_a_teacher_of_16_bits_sends_what_its_kernels_take(live, hf_model, sequences, starts):
    from opd.server.engine import Engine
    from opd.teachers import LocalTeacher

    teacher = LocalTeacher(hf_model(seed=2, hidden_size=24).bfloat16(), name="teacher")
    client = connect("opd", live(Engine(teacher, name="tiny")), vocab_size=VOCAB_SIZE)
    for found, ids, start in zip(
        client.score(sequences, starts, signal="hidden"), sequences, starts, strict=True
    ):
        assert found.hidden.dtype == client.head().weight.dtype == torch.bfloat16
        trajectory = Trajectory(
            ids=ids, prompt_length=start, loss_mask=torch.arange(len(ids)) >= start
        )
        local = teacher.hidden(collate([trajectory], pad_id=0))
        # another padding, another order of sums
        torch.testing.assert_close(found.hidden, local, rtol=0.05, atol=0.05)
