# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from opd.objectives import FullVocab, Topk
from opd.sparse_law import SparseLaw, TopkRows
from opd.teachers import LocalTeacher

VOCAB_SIZE = 45


def _loss(objective, student, teacher_law, batch):
    student.model.zero_grad(set_to_none=True)
    signal = objective(student.law(batch), teacher_law, batch, batch.num_tokens)
    signal.loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    return signal, gradients


def _reported(law):
    """What a server tells of a local law."""

    def ask(num_topk, token_ids, temperature):
        found = law.topk(num_topk, token_ids=token_ids, temperature=temperature)
        return TopkRows(
            ids=found.ids,
            logprobs=found.logprobs,
            tail_logprob=found.tail_logprob,
            token_logprobs=found.token_logprobs,
        )

    return SparseLaw(ask, source="the server at nowhere", num_topk=8, temperature=None)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_all_but_one_token_are_the_whole_law(student, teacher, batch, divergence):
    law = teacher.law(batch)
    topk, gradients = _loss(
        Topk(divergence=divergence, teacher_top_k=VOCAB_SIZE - 1), student, law, batch
    )
    full, expected = _loss(FullVocab(divergence=divergence), student, law, batch)
    assert float(topk.loss) == pytest.approx(float(full.loss), rel=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_student_equal_to_teacher_has_no_loss(hf_model, student, batch, support, tail):
    twin = LocalTeacher(hf_model(seed=1), name="teacher")
    objective = Topk(divergence="reverse_kl", teacher_top_k=5, support=support, tail=tail)
    signal, gradients = _loss(objective, student, twin.law(batch), batch)
    assert float(signal.loss) == pytest.approx(0.0, abs=1e-6)
    assert gradients.abs().max() < 1e-5


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
def test_a_server_is_as_good_as_the_law_itself(student, teacher, batch, support):
    objective = Topk(divergence="jsd", params={"beta": 0.3}, teacher_top_k=6, support=support)
    law = teacher.law(batch)
    local, gradients = _loss(objective, student, law, batch)
    sparse = _reported(law)
    objective.ask(sparse, batch)
    served, theirs = _loss(objective, student, sparse, batch)
    assert torch.equal(local.loss, served.loss)
    assert torch.equal(gradients, theirs)


def test_the_bucket_is_a_lower_bound_that_rises_with_k(student, teacher, batch):
    law = teacher.law(batch)
    losses = [
        float(_loss(Topk(teacher_top_k=k), student, law, batch)[0].loss) for k in (1, 4, 16, 44)
    ]
    full = float(_loss(FullVocab(divergence="forward_kl"), student, law, batch)[0].loss)
    assert losses == sorted(losses)
    assert losses[-1] <= full * (1 + 1e-5)


def test_statistics_are_per_token(student, teacher, batch):
    signal, _ = _loss(Topk(teacher_top_k=3), student, teacher.law(batch), batch)
    names = {"student_mass", "teacher_mass", "entropy", "forward_kl_topk", "reverse_kl_topk"}
    assert signal.statistics.keys() == names
    for values in signal.statistics.values():
        assert values.shape == (batch.num_tokens,) and not values.requires_grad
    torch.testing.assert_close(
        signal.statistics["teacher_mass"], teacher.law(batch).topk(3).logprobs.exp().sum(1)
    )


def test_temperature_divides_both(student, teacher, batch):
    law = teacher.law(batch)
    topk, _ = _loss(Topk(temperature=2.0, teacher_top_k=44), student, law, batch)
    full, _ = _loss(FullVocab(divergence="forward_kl", temperature=2.0), student, law, batch)
    assert float(topk.loss) == pytest.approx(float(full.loss), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tail": "drop", "divergence": "reverse_kl"}, "tail: must not be 'drop' with divergence"),
        ({"tail": "renormalize_teacher", "divergence": "reverse_kl"}, "renormalize_teacher"),
        ({"divergence": "cross_entropy"}, "cross_entropy has no teacher; use kind: token_nll"),
        ({"teacher_top_k": 0}, "teacher_top_k"),
        ({"support": "given"}, "support"),
    ],
)
def test_refuses(settings, words):
    with pytest.raises(ValidationError, match=words):
        Topk(**settings)
