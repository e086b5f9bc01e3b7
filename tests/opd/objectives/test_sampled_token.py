# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import opd_kernels as opk
from opd.batch import Batch, Head, Law, collate
from opd.objectives import FullVocab, SampledToken
from opd.objectives.sampled_token import discounted_sums
from opd.teachers import LocalTeacher


def _token_batch(token_ids, behaviour_logprobs):
    num_tokens = len(token_ids)
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), token_ids])[None]
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(num_tokens + 1)[None],
        token_idx=torch.arange(num_tokens),
        token_ids=token_ids,
        segment_ends=torch.tensor([num_tokens]),
        lengths=(num_tokens + 1,),
        prompt_lengths=(1,),
        behaviour_logprobs=behaviour_logprobs,
        num_input_tokens=num_tokens + 1,
    )


def test_mean_over_the_vocabulary_is_the_gradient_of_reverse_kl():
    torch.manual_seed(3)
    vocab_size, width = 8, 5
    hidden = torch.randn(1, width, dtype=torch.float64, requires_grad=True)
    student_head = torch.randn(vocab_size, width, dtype=torch.float64)
    teacher = Law(
        lambda: torch.randn(1, width, dtype=torch.float64, generator=torch.manual_seed(4)),
        Head(torch.randn(vocab_size, width, dtype=torch.float64)),
    )
    student = Law(lambda: hidden, Head(student_head))
    law = torch.log_softmax(hidden.detach() @ student_head.T, -1)[0]
    mean = torch.zeros_like(hidden)
    for token in range(vocab_size):
        batch = _token_batch(torch.tensor([token]), law[token : token + 1])
        loss = SampledToken()(student, teacher, batch, 1).loss
        (gradient,) = torch.autograd.grad(loss, hidden)
        mean += law[token].exp() * gradient
    batch = _token_batch(torch.tensor([0]), law[:1])
    loss = FullVocab(divergence="reverse_kl")(student, teacher, batch, 1).loss
    (exact,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-11)


def test_a_mixture_is_weighted_back_to_the_students_law():
    torch.manual_seed(3)
    vocab_size, width = 8, 5
    hidden = torch.randn(1, width, dtype=torch.float64, requires_grad=True)
    student = Law(lambda: hidden, Head(torch.randn(vocab_size, width, dtype=torch.float64)))
    teacher = Law(
        lambda: torch.ones(1, width, dtype=torch.float64),
        Head(torch.randn(vocab_size, width, dtype=torch.float64)),
    )
    ids = torch.arange(vocab_size)
    p, q = (
        torch.log_softmax(law.head.logits(law.hidden().detach()).double(), -1)[0].exp()
        for law in (teacher, student)
    )
    mixture = 0.2 * p + 0.8 * q
    mean = torch.zeros_like(hidden)
    for token in ids.tolist():
        batch = _token_batch(torch.tensor([token]), mixture[token : token + 1].log())
        batch = replace(batch, token_origin=torch.tensor([1], dtype=torch.uint8))
        loss = SampledToken()(student, teacher, batch, 1).loss
        (gradient,) = torch.autograd.grad(loss, hidden)
        mean += mixture[token] * gradient
    loss = FullVocab(divergence="reverse_kl")(student, teacher, batch, 1).loss
    (exact,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(mean, exact, rtol=1e-5, atol=1e-6)


def _on_policy(trajectories, law):
    """The trajectories, with the law's own log-probabilities as the sampler's."""
    batch = collate(trajectories, pad_id=0)
    with torch.no_grad():
        return replace(
            batch, behaviour_logprobs=law(batch).token_logprobs(batch.token_ids).logprobs
        )


def test_student_equal_to_teacher_has_no_gradient_at_all(hf_model, student, trajectories):
    twin = LocalTeacher(hf_model(seed=1), name="teacher")
    batch = _on_policy(trajectories, student.law)
    signal = SampledToken()(student.law(batch), twin.law(batch), batch, batch.num_tokens)
    signal.loss.backward()
    assert signal.loss.item() == 0.0
    assert all(not p.grad.any() for p in student.model.parameters())
    assert torch.equal(signal.statistics["importance_ratio"], torch.ones(batch.num_tokens))


def test_loss_is_the_surrogate_by_hand(student, teacher, batch):
    objective = SampledToken(kl_coef=0.5)
    signal = objective(student.law(batch), teacher.law(batch), batch, batch.num_tokens)
    with torch.no_grad():
        ours = student.law(batch).token_logprobs(batch.token_ids).logprobs
        theirs = teacher.law(batch).token_logprobs(batch.token_ids).logprobs
    advantages = -0.5 * (batch.behaviour_logprobs - theirs)
    expected = -((ours - batch.behaviour_logprobs).exp() * advantages).mean()
    assert signal.loss.item() == pytest.approx(float(expected), rel=1e-6)


def test_a_ratio_other_than_one_reweights_the_gradient():
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    student = Law(lambda: hidden, Head(head))
    teacher = Law(lambda: torch.zeros(1, 2), Head(head))
    logprob = opk.fused_linear_token_logprobs(hidden.detach(), head, torch.tensor([0])).logprobs
    gradients = []
    for shift in (0.0, 0.5):
        batch = _token_batch(torch.tensor([0]), logprob - shift)
        signal = SampledToken()(student, teacher, batch, 1)
        advantage = -(logprob - shift - torch.log(torch.tensor(0.5)))
        (gradient,) = torch.autograd.grad(signal.loss, hidden)
        gradients.append(gradient / advantage)
    torch.testing.assert_close(gradients[1], gradients[0] * torch.tensor(0.5).exp())


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_discounted_sums_stay_within_their_completion(discount):
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    sums = discounted_sums(values, torch.tensor([3, 5]), discount)
    d = discount
    expected = [1 + 2 * d + 3 * d * d, 2 + 3 * d, 3, 4 + 5 * d, 5]
    torch.testing.assert_close(sums, torch.tensor(expected))
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_no_trained_token_is_no_loss(student, teacher, trajectories):
    nothing = [replace(t, loss_mask=torch.zeros_like(t.loss_mask)) for t in trajectories]
    batch = collate(nothing, pad_id=0)
    loss = SampledToken()(student.law(batch), teacher.law(batch), batch, 1).loss
    loss.backward()
    assert loss.item() == 0.0


def test_the_teacher_gets_no_gradient(student, teacher, batch):
    SampledToken()(student.law(batch), teacher.law(batch), batch, 1).loss.backward()
    assert all(p.grad is None for p in teacher.model.parameters())
