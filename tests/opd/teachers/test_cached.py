# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from opd.batch import collate
from opd.config import parse_config
from opd.objectives import FullVocab, Topk
from opd.schema import ConfigError
from opd.store import StoreError, TeacherStore, fingerprint_of
from opd.teachers import CachedTeacher

VOCAB_SIZE = 45


def _fill(path, teacher, tokenizer, trajectories, *, num_topk=8, temperature=1.0, bits=16):
    store = TeacherStore.create(
        path,
        fingerprint=fingerprint_of(
            teacher.model, tokenizer, name="tiny", temperature=temperature, vocab_size=VOCAB_SIZE
        ),
        vocab_size=VOCAB_SIZE,
        num_topk=num_topk,
        bits=bits,
    )
    with store.writer() as writer:
        for trajectory in trajectories:
            with torch.no_grad():
                logits = teacher.model(trajectory.ids[None]).logits[0]
            law = (logits[trajectory.prompt_length - 1 : -1] / temperature).log_softmax(-1)
            logprobs, ids = law.topk(num_topk, dim=1)
            rest = law.scatter(1, ids, -torch.inf).logsumexp(1)
            prompt = trajectory.ids[: trajectory.prompt_length]
            writer.append(prompt, trajectory.completion_ids, ids.int(), logprobs, rest)
    return store


@pytest.fixture
def store(tmp_path, teacher, tokenizer, trajectories):
    return _fill(tmp_path / "store", teacher, tokenizer, trajectories)


def _loss(objective, student, teacher, batch):
    student.model.zero_grad(set_to_none=True)
    law = teacher.law(batch)
    objective.ask(law, batch)
    signal = objective(student.law(batch), law, batch, batch.num_tokens)
    signal.loss.backward()
    return signal, torch.cat([p.grad.flatten() for p in student.model.parameters()])


@pytest.mark.parametrize("num_topk", [1, 3, 8])
@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_the_store_says_what_the_teacher_says(student, teacher, store, batch, num_topk, tail):
    if num_topk == 1 and tail == "renormalize_both":
        pytest.skip("one entry that is everything has no divergence")
    objective = Topk(divergence="jsd", teacher_top_k=num_topk, tail=tail)
    local, expected = _loss(objective, student, teacher, batch)
    cached, gradients = _loss(objective, student, CachedTeacher(store), batch)
    # as exact as 16 bits for a log-probability are
    assert cached.loss.item() == pytest.approx(local.loss.item(), rel=1e-4)
    torch.testing.assert_close(gradients, expected, rtol=1e-2, atol=1e-4)


def test_other_orders_and_paddings_find_the_same_laws(student, store, trajectories):
    objective = Topk(teacher_top_k=8)
    teacher = CachedTeacher(store)
    whole, _ = _loss(objective, student, teacher, collate(trajectories, pad_id=0))
    backward, _ = _loss(objective, student, teacher, collate(trajectories[::-1], pad_id=7))
    assert backward.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)


def test_a_completion_that_is_not_there_is_an_error_in_words(student, store, make_trajectories):
    batch = collate(make_trajectories([(4, 9)]), pad_id=0)
    words = r"has no laws of a prompt of 4 tokens with a completion of 9; it has 5 others.*dataset"
    with pytest.raises(StoreError, match=words):
        _loss(Topk(teacher_top_k=4), student, CachedTeacher(store), batch)


def test_more_than_the_store_has_is_an_error(student, store, batch):
    with pytest.raises(ConfigError, match="must be at most the 8 that the store"):
        _loss(Topk(teacher_top_k=9), student, CachedTeacher(store), batch)


def test_its_law_is_at_one_temperature(student, teacher, tokenizer, trajectories, batch, tmp_path):
    hot = _fill(tmp_path / "hot", teacher, tokenizer, trajectories, temperature=2.0)
    objective = Topk(teacher_top_k=8, temperature=2.0)
    local, _ = _loss(objective, student, teacher, batch)
    cached, _ = _loss(objective, student, CachedTeacher(hot), batch)
    assert cached.loss.item() == pytest.approx(local.loss.item(), rel=1e-4)
    with pytest.raises(ValueError, match="reports its law at temperature 2, got temperature 1"):
        _loss(Topk(teacher_top_k=8), student, CachedTeacher(hot), batch)


def test_has_no_hidden_states(student, store, batch):
    with pytest.raises(ValueError, match=r"and no hidden states; objective\.kind must be 'topk'"):
        _loss(FullVocab(), student, CachedTeacher(store), batch)


def test_refuses_another_tokenizer_and_another_size(store, student, tokenizer):
    class _Other:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ConfigError, match=r"whose first 45 tokens have the hash \w+"):
        CachedTeacher(store).check_fits(student, _Other())

    class _More:
        def get_vocab(self):
            return {**tokenizer.get_vocab(), "added": VOCAB_SIZE}

    # no law is about it
    CachedTeacher(store).check_fits(student, _More())

    class _Wider:
        lm_head_weight = torch.zeros(50, 2)
        vocab_size = None

    with pytest.raises(
        ConfigError, match=r"over 45 tokens and the student's over 50; set vocab_size=45"
    ):
        CachedTeacher(store).check_fits(_Wider(), tokenizer)


def test_objectives_that_need_more_are_refused(values):
    values["teacher"] = {"kind": "cached", "path": "nowhere"}
    with pytest.raises(
        ConfigError,
        match=r"likeliest tokens, tokens that it draws; .* asks for hidden states",
    ):
        parse_config(values)
