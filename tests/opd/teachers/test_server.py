# SPDX-License-Identifier: Apache-2.0
"""The loop's teacher behind a client; the clients are tested in tests/opd/clients."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch

from opd.batch import collate
from opd.clients import Scores, TeacherInfo, TeacherRefused, TeacherUnavailable
from opd.config import parse_config
from opd.objectives import FullVocab, SampledToken, Topk
from opd.schema import ConfigError
from opd.teachers import ServerConfig, ServerTeacher

SIGNALS = ["hidden", "topk"]


class _Client:
    """What a server would say, from a model at hand."""

    def __init__(self, teacher):
        self.teacher = teacher
        self.calls = []
        # results to lose, one list per call: indices without an answer
        self.failures = []

    def info(self):
        return TeacherInfo(vocab_size=45, max_length=64)

    def check(self, tokenizer):
        return []

    def head(self):
        return self.teacher.head

    def score(self, sequences, starts, *, signal, num_topk=64, query_ids=None, temperature=1.0):
        self.calls.append([len(ids) for ids in sequences])
        found = []
        for i, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
            queries = None if query_ids is None else query_ids[i]
            found.append(self._one(ids, start, signal, num_topk, queries, temperature))
        if self.failures:
            lost = self.failures.pop(0)
            kept = [None if i in lost else score for i, score in enumerate(found)]
            raise TeacherUnavailable("teacher http://nowhere gave no answer within 1 s", kept)
        return found

    @torch.no_grad()
    def _one(self, ids, start, signal, num_topk, queries, temperature):
        completion = ids[start:].int()
        out = self.teacher.model.base_model(input_ids=ids[None], use_cache=False)
        hidden = out.last_hidden_state[0, start - 1 : -1]
        if signal == "hidden":
            return Scores(token_ids=completion, hidden=hidden)
        law = (self.teacher.head.logits(hidden) / temperature).log_softmax(-1)
        logprobs, best = law.topk(num_topk, dim=1)
        queries = completion[:, None] if queries is None else queries
        told = law.gather(1, queries.long().clamp(min=0)).masked_fill(queries < 0, -torch.inf)
        rest = law.scatter(1, best, -torch.inf).logsumexp(1)
        return Scores(
            token_ids=completion,
            ids=best.int(),
            logprobs=logprobs,
            tail_logprob=rest,
            token_logprobs=told,
        )


@pytest.fixture
def client(teacher):
    return _Client(teacher)


def _served(client, signal="topk", **settings):
    config = ServerConfig(url="http://nowhere:1", signal=signal, deadline_s=1.0, **settings)
    return ServerTeacher(client, config)


def _loss(objective, student, teacher, batch):
    student.model.zero_grad(set_to_none=True)
    law = teacher.law(batch)
    objective.ask(law, batch)
    signal = objective(student.law(batch), law, batch, batch.num_tokens)
    signal.loss.backward()
    return signal, torch.cat([p.grad.flatten() for p in student.model.parameters()])


def _objectives(signal):
    asked = [
        Topk(teacher_top_k=6),
        Topk(teacher_top_k=6, support="student", divergence="reverse_kl"),
        Topk(teacher_top_k=6, support="union", divergence="jsd", temperature=0.7),
        SampledToken(),
        SampledToken(temperature=2.0),
    ]
    return [*asked, FullVocab(), FullVocab(temperature=2.0)] if signal == "hidden" else asked


@pytest.mark.parametrize("signal", SIGNALS)
def test_every_objective_is_as_with_the_teacher_at_hand(student, teacher, client, batch, signal):
    for objective in _objectives(signal):
        local, expected = _loss(objective, student, teacher, batch)
        served, gradients = _loss(objective, student, _served(client, signal), batch)
        assert served.loss.item() == pytest.approx(local.loss.item(), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("signal", SIGNALS)
def test_asks_once_per_batch(student, client, batch, signal):
    _loss(Topk(teacher_top_k=6), student, _served(client, signal), batch)
    assert len(client.calls) == 1
    _loss(SampledToken(), student, _served(client, signal), batch)
    assert len(client.calls) == 2


def test_a_dead_server_loses_no_answer(student, teacher, client, batch, caplog):
    expected, _ = _loss(Topk(teacher_top_k=6), student, teacher, batch)
    client.failures = [[0, 2, 3], [1], []]
    with caplog.at_level(logging.WARNING):
        served, _ = _loss(Topk(teacher_top_k=6), student, _served(client), batch)
    assert served.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    # all five, then the three without an answer, then the one of them that still had none
    assert [len(call) for call in client.calls] == [5, 3, 1]
    assert "training waits and asks again, 2 of 5 completions are scored" in caplog.text


def test_patience_counts_from_the_last_answer(student, client, batch, monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr("opd.teachers.server.time.monotonic", lambda: 2.0 * next(seconds))
    # an answer to four, then none to the fifth
    client.failures = [[0]] * 10
    with pytest.raises(TeacherUnavailable):
        _loss(Topk(teacher_top_k=6), student, _served(client, patience_s=5.0), batch)
    assert [len(call) for call in client.calls] == [5, 1, 1]


def test_a_signal_ends_the_wait(student, client, batch):
    client.failures = [[0]] * 10
    teacher = _served(client)

    def give_up():
        raise KeyboardInterrupt

    teacher.on_wait = give_up
    with pytest.raises(KeyboardInterrupt):
        _loss(Topk(teacher_top_k=6), student, teacher, batch)
    assert len(client.calls) == 1


def test_a_signal_does_not_wait_for_an_answer(student, client, batch, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(client, "score", lambda *arguments, **settings: answer.wait(20))
    teacher, begin = _served(client), time.monotonic()

    def give_up():
        raise KeyboardInterrupt

    teacher.on_wait = give_up
    try:
        with pytest.raises(KeyboardInterrupt):
            _loss(Topk(teacher_top_k=6), student, teacher, batch)
        assert time.monotonic() - begin < 2
    finally:
        answer.set()


def test_a_server_that_is_not_up_yet_is_waited_for(student, client, tokenizer, caplog):
    tries = []

    def check(tokenizer):
        tries.append(1)
        if len(tries) < 3:
            raise TeacherUnavailable("teacher http://nowhere gave no answer within 1 s")
        return []

    client.check = check
    with caplog.at_level(logging.WARNING):
        _served(client).check_fits(student, tokenizer)
    assert len(tries) == 3
    assert caplog.text.count("gave no answer within 1 s; training waits and asks again") == 2
    tries.clear()
    with pytest.raises(TeacherUnavailable):
        _served(client, patience_s=1e-9).check_fits(student, tokenizer)


def test_where_a_server_is_changes_no_weight(values):
    from opd.config import config_hash

    hashes = set()
    for url in ("http://here:1", "http://there:2"):
        values["teacher"] = {"kind": "server", "url": url, "deadline_s": 1 + len(url)}
        hashes.add(config_hash(parse_config(values)))
    values["teacher"]["signal"] = "topk"
    values["objective"] = {"kind": "topk"}
    assert len(hashes) == 1 and config_hash(parse_config(values)) not in hashes


def test_untrained_tokens_and_empty_completions(student, teacher, client, make_trajectories):
    batch = collate(make_trajectories([(3, 5), (2, 1), (4, 7)]), pad_id=0)
    kept = batch.completion_rows()
    assert [rows.tolist() for rows in kept] == [[0, 2, 3, 4], [0], [0, 2, 3, 4, 5, 6]]
    objective = Topk(teacher_top_k=4, support="student")
    local, _ = _loss(objective, student, teacher, batch)
    served, _ = _loss(objective, student, _served(client), batch)
    assert served.loss.item() == pytest.approx(local.loss.item(), rel=1e-5)


def test_refuses_a_vocabulary_of_another_size(client, tokenizer):
    class _Student:
        lm_head_weight = torch.zeros(50, 2)

    with pytest.raises(
        TeacherRefused, match=r"over 45 tokens and the student's over 50.*vocab_size=45"
    ):
        _served(client).check_fits(_Student(), tokenizer)


@pytest.mark.parametrize(
    ("teacher", "objective", "words"),
    [
        ({"protocol": "vllm", "signal": "hidden"}, {}, "signal: must be 'topk' with protocol"),
        ({"protocol": "vllm"}, {"kind": "full_vocab"}, "asks for hidden states"),
        ({"protocol": "sglang"}, {"kind": "topk", "support": "student"}, "tokens it is given"),
        ({"protocol": "vllm"}, {"kind": "topk", "temperature": 2.0}, "must be 1 with teacher.kind"),
        ({"signal": "topk", "projected": True}, {}, "projected: needs signal 'hidden'"),
        ({"signal": "topk"}, {"kind": "full_vocab"}, "asks for hidden states"),
        ({"protocol": "opd", "model": "x"}, {}, "model: is for protocol 'vllm'"),
        ({"signal": "topk", "hidden_dtype": "float32"}, {}, "hidden_dtype: needs signal 'hidden'"),
    ],
)
def test_refuses_what_does_not_fit(values, teacher, objective, words):
    values["teacher"] = {"kind": "server", "url": "http://nowhere:1", **teacher}
    values["objective"] = {"kind": "topk", **objective}
    with pytest.raises(ConfigError, match=words):
        parse_config(values)


def test_a_server_cannot_write(values):
    values["teacher"] = {"kind": "server", "url": "http://nowhere:1"}
    values["rollouts"] = {"kind": "dataset", "seq_kd": True, "max_completion_length": 8}
    values["objective"] = {"kind": "full_vocab"}
    with pytest.raises(ConfigError, match=r"must be 'local' for rollouts\.seq_kd"):
        parse_config(values)
