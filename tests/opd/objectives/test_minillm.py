# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.batch import Batch, Head, Law, collate
from opd.config import load_config
from opd.objectives import FullVocab, Minillm
from opd.schema import ConfigError
from opd.teachers import LocalTeacher

# what leaves an unbiased estimate of the gradient of whole completions' reverse KL
UNBIASED = {"length_normalization": False, "cliprange": None}
VOCAB = 4
HF = "rollouts={kind: hf}"


def _law(logits):
    return Law(lambda: logits, Head(torch.eye(logits.shape[1], dtype=logits.dtype)))


def _batch(token_ids, behaviour_logprobs, ends=None):
    num_tokens = len(token_ids)
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), token_ids])[None]
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(num_tokens + 1)[None],
        token_idx=torch.arange(num_tokens),
        token_ids=token_ids,
        segment_ends=torch.tensor([num_tokens] if ends is None else ends),
        lengths=(num_tokens + 1,),
        prompt_lengths=(1,),
        behaviour_logprobs=behaviour_logprobs,
        num_input_tokens=num_tokens + 1,
    )


class _Tree:
    """Two models of completions of two tokens: rows are the laws behind nothing, and behind each
    first token."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        shape = (VOCAB + 1, VOCAB)
        self.teacher, logits = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        self.student = logits.requires_grad_()
        self.p, self.q = (z.detach().log_softmax(-1).exp() for z in (self.teacher, logits))

    def mean_gradient(self, objective, first_law):
        """Of the objective over completions whose first token has that law, the second the
        student's. [1 + VOCAB, VOCAB]"""
        mean = torch.zeros_like(self.student)
        for first in range(VOCAB):
            for second in range(VOCAB):
                rows = torch.tensor([0, 1 + first])
                drawn = torch.stack([first_law[first], self.q[1 + first, second]])
                batch = _batch(torch.tensor([first, second]), drawn.log())
                loss = objective(_law(self.student[rows]), _law(self.teacher[rows]), batch, 1).loss
                (gradient,) = torch.autograd.grad(loss, self.student)
                mean += drawn.prod() * gradient
        return mean

    def gradient_of_sequence_kl(self):
        """Of sum_y Q(y) log(Q(y) / P(y)) over all completions y, by autograd."""
        laws = [z.log_softmax(-1) for z in (self.student, self.teacher)]
        q, p = (law[0][:, None] + law[1:] for law in laws)
        (gradient,) = torch.autograd.grad((q.exp() * (q - p)).sum(), self.student)
        return gradient


@pytest.mark.parametrize("decomposed", [True, False])
def test_mean_over_completions_is_the_gradient_of_their_reverse_kl(decomposed):
    tree = _Tree()
    objective = Minillm(single_step_decomposition=decomposed, **UNBIASED)
    found = tree.mean_gradient(objective, tree.q[0])
    torch.testing.assert_close(found, tree.gradient_of_sequence_kl(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decomposed", [True, False])
def test_a_mixed_token_is_weighted_back_to_the_students_law(decomposed):
    tree = _Tree()
    objective = Minillm(single_step_decomposition=decomposed, **UNBIASED)
    mixture = 0.2 * tree.p[0] + 0.8 * tree.q[0]
    found = tree.mean_gradient(objective, mixture)
    expected = tree.gradient_of_sequence_kl()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-11)
    # what truncation leaves out: a state is met as often as the mixture comes there
    visits = (mixture / tree.q[0])[:, None]
    torch.testing.assert_close(found[1:], visits * expected[1:], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decomposed", [True, False])
def test_without_later_rewards_it_is_the_reverse_kl_of_each_token(decomposed):
    tree = _Tree()
    objective = Minillm(
        single_step_decomposition=decomposed, kl_discount_factor=0.0, cliprange=None
    )
    if not decomposed:
        # a mean over both tokens would halve the first one's
        objective = objective.model_copy(update={"length_normalization": False})
    exact = tree.mean_gradient(FullVocab(divergence="reverse_kl"), tree.q[0])
    found = tree.mean_gradient(objective, tree.q[0])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


def _rewarded(rewards):
    """Laws of two tokens at which log P - log Q of token 0 is as given, and the batch."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    q = torch.full_like(rewards, 0.04)
    p = q * rewards.exp()
    student, teacher = (torch.stack([law, 1 - law], 1).log() for law in (q, p))
    ids = torch.zeros(len(rewards), dtype=torch.int64)
    return student.requires_grad_(), teacher, _batch(ids, q.log())


@pytest.mark.parametrize(
    ("settings", "advantages"),
    [
        ({}, [1.869167, 2.425, 3.0]),
        ({"length_normalization": False}, [5.6075, 4.85, 3.0]),
        ({"kl_coef": 2.0}, [3.738333, 4.85, 6.0]),
        ({"kl_coef": 2.0, "cliprange_reward": 4.0}, [3.136667, 3.9, 4.0]),
        ({"single_step_decomposition": True}, [2.30375, 2.85, 0.0]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_advantages_of_known_rewards(settings, advantages):
    student, teacher, batch = _rewarded([1.0, 2.0, 3.0])
    own = {"single_step_decomposition": False, "kl_discount_factor": 0.95, **settings}
    loss = Minillm(**own)(_law(student), _law(teacher), batch, 3).loss
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    dense = -(torch.tensor(advantages) * q[:, 0]).sum() / 3
    if own["single_step_decomposition"]:
        dense = dense + (q.exp() * (q - p)).sum() / 3
    found, expected = (torch.autograd.grad(value, student)[0] for value in (loss, dense))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def _textbook(student, teacher, batch, objective):
    """The loss by loops over the tokens of each completion, from logits [T, V]."""
    q, p = ((z / objective.temperature).log_softmax(-1) for z in (student, teacher))
    ids = batch.token_ids.tolist()
    total, begin = 0.0, 0
    for end in batch.segment_ends.tolist():
        for t in range(begin, end):
            own = q[t, ids[t]]
            ratio = float((own.detach() - batch.behaviour_logprobs[t]).exp())
            behind = range(t + objective.single_step_decomposition, end)
            terms = []
            for k in behind:
                reward = objective.kl_coef * float((p - q.detach())[k, ids[k]])
                limit = objective.cliprange_reward or float("inf")
                terms.append(
                    objective.kl_discount_factor ** (k - t) * min(max(reward, -limit), limit)
                )
            count = len(behind) if objective.length_normalization else 1
            advantage = sum(terms) / max(1, count)
            # PPO's surrogate is the smaller of two, its ratio's gradient ratio * grad log q
            surrogate = ratio * (own - own.detach() + 1) * advantage
            if objective.cliprange is not None:
                low, high = 1 - objective.cliprange, 1 + objective.cliprange
                clipped = min(max(ratio, low), high) * advantage
                if clipped < ratio * advantage:
                    surrogate = torch.tensor(clipped)
            total = total - surrogate
            if objective.single_step_decomposition:
                total = total + ratio * (q[t].exp() * (q[t] - p[t])).sum()
            total = total - objective.cross_entropy_weight * student[t].log_softmax(-1)[ids[t]]
        begin = end
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_discount_factor": 0.9, "cliprange": None, "temperature": 0.7, "kl_coef": 0.5},
        {"length_normalization": False, "cliprange_reward": 0.3, "cross_entropy_weight": 0.5},
        {"single_step_decomposition": False, "temperature": 1.3, "cliprange": 0.1},
        {"single_step_decomposition": False, "length_normalization": False, "kl_coef": 2.0},
    ],
    ids=lambda settings: ",".join(settings) or "defaults",
)
def test_gradient_is_that_of_the_textbook(settings):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        torch.randn(9, 6, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    student.requires_grad_()
    objective = Minillm(**settings)
    ids = torch.randint(6, (9,), generator=generator)
    drawn = (student.detach() / objective.temperature).log_softmax(-1)
    drawn = drawn.gather(1, ids[:, None])[:, 0] + 0.4 * torch.randn(9, generator=generator)
    # the second completion has no trained token
    batch = _batch(ids, drawn, ends=[3, 3, 4, 9])
    signal = objective(_law(student), _law(teacher), batch, 11)
    expected = _textbook(student, teacher, batch, objective) / 11
    found, expected = (torch.autograd.grad(loss, student)[0] for loss in (signal.loss, expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    if objective.cliprange is not None:
        assert 0 < signal.statistics["clip_ratio"].sum() < 9
    assert all(rows.shape == (9,) for rows in signal.statistics.values())


def _gradients(student, teacher, objective, trajectories, num_step_tokens):
    student.model.zero_grad()
    batch = collate(trajectories, pad_id=0)
    signal = objective(student.law(batch), teacher.law(batch), batch, num_step_tokens)
    signal.loss.backward()
    return signal.loss.item(), {name: p.grad for name, p in student.model.named_parameters()}


def test_no_split_of_a_step_changes_its_loss_or_gradient(student, teacher, trajectories):
    objective = Minillm(kl_discount_factor=0.95)
    count = collate(trajectories, pad_id=0).num_tokens
    whole, expected = _gradients(student, teacher, objective, trajectories, count)
    parts = [
        _gradients(student, teacher, objective, part, count)
        for part in (trajectories[:1], trajectories[1:3], trajectories[3:])
    ]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-5)
    for name, gradient in expected.items():
        found = sum(gradients[name] for _, gradients in parts)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("decomposed", [True, False])
def test_student_equal_to_teacher_has_no_gradient(hf_model, student, trajectories, decomposed):
    twin = LocalTeacher(hf_model(seed=1), name="teacher")
    objective = Minillm(single_step_decomposition=decomposed)
    loss, gradients = _gradients(student, twin, objective, trajectories, 15)
    assert loss == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("decomposed", [True, False])
def test_no_trained_token_is_no_loss(student, teacher, trajectories, decomposed):
    nothing = [replace(t, loss_mask=torch.zeros_like(t.loss_mask)) for t in trajectories]
    objective = Minillm(single_step_decomposition=decomposed)
    assert _gradients(student, teacher, objective, nothing, 1)[0] == 0.0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["teacher={kind: server, url: 'http://127.0.0.1:1', protocol: vllm}", HF],
            "objective.kind 'minillm' asks for hidden states",
        ),
        (["rollouts={kind: mixture}"], "rollouts.kind: must be 'hf', 'teacher_mixed' or"),
        (["objective.temperature=0.5"], "objective.temperature: must equal rollouts.temperature"),
        (["rollouts={kind: hf, top_p: 0.9}"], "objective.cliprange: must be null with rollouts"),
        (["objective.kl_discount_factor=1.5"], "objective.kl_discount_factor: must be <= 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config("minillm", overrides)


def test_without_its_first_term_a_teacher_of_log_probabilities_is_enough():
    overrides = [
        "teacher={kind: server, url: 'http://127.0.0.1:1', protocol: vllm}",
        HF,
        "objective.single_step_decomposition=false",
    ]
    assert load_config("minillm", overrides).objective.asks == "token_logprobs"
