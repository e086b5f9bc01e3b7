# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from opd.batch import Head, Law
from opd.objectives import FullVocab, TeacherSamples
from opd.schema import ConfigError
from opd.sparse_law import DrawnLaw, DrawnRows
from opd.teachers import LocalTeacher

VOCAB = 9


@pytest.fixture
def logits():
    """Of a student and of a teacher that disagrees with it, [V] each."""
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(VOCAB, generator=generator) for scale in (1.0, 1.5)]


def _loss(objective, logits, num_tokens, uniforms=None):
    """Loss and its gradient by the logits [T, V] of `num_tokens` positions that are all alike."""
    student, teacher = (row.repeat(num_tokens, 1) for row in logits)
    student.requires_grad_()
    taught = Law(lambda: teacher, Head(torch.eye(VOCAB)))
    if uniforms is not None:
        taught.samples = partial(taught.samples, uniforms=uniforms)
    batch = SimpleNamespace(num_tokens=num_tokens)
    objective.ask(taught, batch)
    signal = objective(Law(lambda: student, Head(torch.eye(VOCAB))), taught, batch, num_tokens)
    signal.loss.backward()
    return signal, num_tokens * student.grad.double()


@pytest.mark.parametrize(("num_draws", "proposal"), [(3, 1.0), (2, 1.6), (6, 0.8)])
def test_gradient_is_on_average_the_whole_forward_kls(logits, num_draws, proposal):
    full, expected = _loss(FullVocab(divergence="forward_kl", temperature=1.3), logits, 1)
    settings = {"num_draws": num_draws, "proposal_temperature": proposal, "temperature": 1.3}
    rounds = 40_000
    torch.manual_seed(1)
    signal, gradients = _loss(TeacherSamples(**settings), logits, rounds)
    error = gradients.std(0) / math.sqrt(rounds)
    # what the weights lose when they are made to sum to 1 is several times as much
    assert error.max() < 3e-3
    assert ((gradients.mean(0) - expected[0]) / error).abs().max() < 4
    assert signal.loss.item() == pytest.approx(full.loss.item(), abs=0.02)


def test_draws_without_chance_are_the_whole_law(logits):
    """4,096 random numbers in equal steps hit each token as often as its probability says."""
    full, expected = _loss(FullVocab(divergence="forward_kl"), logits, 1)
    uniforms = ((torch.arange(4096) + 0.5) / 4096).double()[None]
    for proposal in (1.0, 3.0):
        objective = TeacherSamples(num_draws=4096, proposal_temperature=proposal)
        signal, gradients = _loss(objective, logits, 1, uniforms)
        assert signal.loss.item() == pytest.approx(full.loss.item(), abs=1e-3)
        torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-3)
        entropy = full.statistics["teacher_entropy"]
        torch.testing.assert_close(signal.statistics["teacher_entropy"], entropy, rtol=0, atol=2e-3)


def test_statistics_are_per_token(student, teacher, batch):
    objective = TeacherSamples(num_draws=5)
    signal = objective(student.law(batch), teacher.law(batch), batch, batch.num_tokens)
    assert signal.statistics.keys() == {"student_mass", "entropy", "teacher_entropy"}
    for values in signal.statistics.values():
        assert values.shape == (batch.num_tokens,) and not values.requires_grad


@pytest.mark.parametrize("proposal", [1.0, 2.0])
def test_student_equal_to_teacher_has_no_loss_whatever_is_drawn(hf_model, student, batch, proposal):
    twin = LocalTeacher(hf_model(seed=1), name="teacher")
    objective = TeacherSamples(num_draws=7, proposal_temperature=proposal)
    signal = objective(student.law(batch), twin.law(batch), batch, batch.num_tokens)
    assert signal.loss.item() == pytest.approx(0.0, abs=1e-6)


def test_a_position_whose_weights_underflow_counts_for_nothing(student, batch):
    """Beside others, which count as ever."""

    def loss(weights):
        ids = torch.tensor([[3, 5, -1]]).repeat(batch.num_tokens, 1)
        weights = weights[:, None] * torch.tensor([0.5, 0.25, 0.0])
        rows = DrawnRows(ids=ids, weights=weights)
        made = {"num_draws": 50, "proposal_temperature": 1.0, "temperature": 1.0}
        law = DrawnLaw(lambda: rows, source="x", **made)
        signal = TeacherSamples()(student.law(batch), law, batch, batch.num_tokens)
        student.model.zero_grad()
        signal.loss.backward()
        gradients = [p.grad.flatten().clone() for p in student.model.parameters()]
        return signal.loss.detach(), torch.cat(gradients)

    num_tokens = batch.num_tokens
    first = torch.eye(num_tokens)[0]
    parts = [loss(first), loss(1 - first)]
    whole = loss(torch.ones(num_tokens))
    for one, other, both in zip(*parts, whole, strict=True):
        torch.testing.assert_close(one + other, both)
    nothing = loss(torch.zeros(num_tokens))
    assert nothing[0] == 0 and not nothing[1].any()


def test_draws_that_were_made_with_other_settings_are_refused(student, batch):
    def law(**settings):
        rows = DrawnRows(ids=torch.zeros(1, 1), weights=torch.ones(1, 1))
        made = {"num_draws": 50, "proposal_temperature": 1.0, "temperature": 1.0, **settings}
        return DrawnLaw(lambda: rows, source="the store at x", **made)

    for settings, words in (
        ({"num_draws": 12}, r"objective\.num_draws: must be 12, with which the store at x was"),
        ({"proposal_temperature": 2.0}, r"objective\.proposal_temperature: must be 2, .* got 1"),
        ({"temperature": 2.0}, r"objective\.temperature: must be 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            TeacherSamples()(student.law(batch), law(**settings), batch, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_draws": 0},
        {"num_draws": 4097},
        {"proposal_temperature": 0.2},
        {"proposal_temperature": 5.0},
        {"proposal_temperature": float("nan")},
    ],
)
def test_refuses(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        TeacherSamples(**settings)
