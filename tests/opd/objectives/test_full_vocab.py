# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import opd_kernels as opk
from opd.batch import Head, Law, collate, collate_step
from opd.model import LanguageModel
from opd.objectives import FullVocab, SampledToken, TokenNll
from opd.teachers import LocalTeacher

# cross_entropy has no teacher
DIVERGENCES = [name for name in opk.divergences.DIVERGENCES if name != "cross_entropy"]


def _loss(objective, student, teacher, batches, num_step_tokens):
    student.model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        signal = objective(student.law(batch), teacher.law(batch), batch, num_step_tokens)
        signal.loss.backward()
        total += float(signal.loss.detach())
    gradients = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    return total, gradients


def _dense(student, teacher, batch, objective):
    """The same from whole logits in float64, by the definitions."""
    t_s, t_t = objective.temperature, objective.teacher_temperature or objective.temperature
    q = _logits(student, batch).double() / t_s
    p = _logits(teacher, batch).double() / t_t
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    if objective.divergence == "reverse_kl":
        return (q.exp() * (q - p)).sum(-1).mean()
    if objective.divergence == "forward_kl":
        return (p.exp() * (p - q)).sum(-1).mean()
    raise NotImplementedError


def _logits(model, batch):
    out = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return out.logits.flatten(0, 1)[batch.token_idx]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperatures", [(1.0, None), (2.0, None), (1.0, 0.7)])
def test_matches_dense_logits(student, teacher, batch, divergence, temperatures):
    objective = FullVocab(
        divergence=divergence, temperature=temperatures[0], teacher_temperature=temperatures[1]
    )
    loss, gradients = _loss(objective, student, teacher, [batch], batch.num_tokens)
    student.model.zero_grad()
    dense = _dense(student, teacher, batch, objective)
    dense.backward()
    expected = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    assert loss == pytest.approx(dense.item(), rel=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(hf_model, student, batch, divergence):
    twin = LocalTeacher(hf_model(seed=1), name="teacher")
    objective = FullVocab(divergence=divergence)
    loss, gradients = _loss(objective, student, twin, [batch], batch.num_tokens)
    assert loss == pytest.approx(0.0, abs=1e-7)
    # total variation has a kink there, at which a subgradient of rounding size is right
    assert gradients.abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_splitting_a_step_does_not_change_loss_or_gradient(
    student, teacher, trajectories, batch_size
):
    whole = _loss(
        FullVocab(), student, teacher, *collate_step(trajectories, batch_size=5, pad_id=0)
    )
    parts = collate_step(trajectories, batch_size=batch_size, pad_id=0)
    loss, gradients = _loss(FullVocab(), student, teacher, *parts)
    assert loss == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(gradients, whole[1], rtol=1e-4, atol=1e-6)


def test_order_of_the_trajectories_does_not_matter(student, teacher, trajectories):
    forward = collate(trajectories, pad_id=0)
    backward = collate(trajectories[::-1], pad_id=0)
    first = _loss(FullVocab(), student, teacher, [forward], forward.num_tokens)
    second = _loss(FullVocab(), student, teacher, [backward], backward.num_tokens)
    assert second[0] == pytest.approx(first[0], rel=1e-6)
    torch.testing.assert_close(second[1], first[1], rtol=1e-4, atol=1e-6)


def test_padding_ids_do_not_matter(student, teacher, trajectories):
    losses = []
    for pad_id in (0, 7):
        batch = collate(trajectories, pad_id=pad_id)
        losses.append(_loss(FullVocab(), student, teacher, [batch], batch.num_tokens)[0])
    assert losses[0] == losses[1]


def test_tokens_that_are_masked_do_not_matter_unless_something_follows(
    student, teacher, trajectories
):
    trajectory = trajectories[0]
    mask = trajectory.loss_mask.clone()
    mask[-1] = False
    changed = trajectory.ids.clone()
    changed[-1] = (changed[-1] + 1) % 45
    losses = []
    for ids in (trajectory.ids, changed):
        batch = collate([replace(trajectory, ids=ids, loss_mask=mask)], pad_id=0)
        losses.append(_loss(FullVocab(), student, teacher, [batch], batch.num_tokens))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_workspace_does_not_change_the_loss(student, teacher, batch):
    found = []
    for workspace_bytes in (1 << 16, 1 << 30):
        student.workspace_bytes = workspace_bytes
        found.append(_loss(FullVocab(), student, teacher, [batch], batch.num_tokens))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


# parts of these are constants of the gradient by definition
@pytest.mark.parametrize(
    "divergence",
    [name for name in DIVERGENCES if name not in ("todi", "adaptive_kl", "concrete_score")],
)
def test_gradient_is_that_of_finite_differences(divergence):
    generator = torch.Generator().manual_seed(3)
    head, other = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    hidden = torch.randn(2, 4, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = Law(lambda: hidden.detach() * 0.5 + 0.1, Head(other))
    batch = SimpleNamespace(num_tokens=2)

    def loss(hidden, head):
        return FullVocab(divergence=divergence)(
            Law(lambda: hidden, Head(head)), teacher, batch, 2
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, head.requires_grad_()))


def test_a_batch_without_trained_tokens_has_zero_loss_and_gradient(student, teacher, trajectories):
    nothing = [replace(t, loss_mask=torch.zeros_like(t.loss_mask)) for t in trajectories]
    batches, num_tokens = collate_step(nothing, batch_size=5, pad_id=0)
    assert num_tokens == 0
    loss, gradients = _loss(FullVocab(), student, teacher, batches, 1)
    assert loss == 0.0
    assert not gradients.any()


def test_the_teacher_gets_no_gradient(student, teacher, batch):
    _loss(FullVocab(), student, teacher, [batch], batch.num_tokens)
    assert all(p.grad is None for p in teacher.model.parameters())


def test_statistics_are_per_token_and_carry_no_graph(student, teacher, batch):
    signal = FullVocab()(student.law(batch), teacher.law(batch), batch, batch.num_tokens)
    names = {"entropy", "teacher_entropy", "forward_kl", "reverse_kl", "top1_agreement"}
    assert set(signal.statistics) == names
    for values in signal.statistics.values():
        assert values.shape == (batch.num_tokens,)
        assert not values.requires_grad
    assert signal.loss.item() == pytest.approx(float(signal.statistics["reverse_kl"].mean()))


def test_a_gradient_tolerance_drops_only_what_it_counts(hf_model, make_trajectories):
    pair = hf_model(seed=1, vocab_size=900), hf_model(seed=2, vocab_size=900)
    student, teacher = LanguageModel(pair[0]), LocalTeacher(pair[1], name="teacher")
    batch = collate(make_trajectories([(2, 6)] * 4, vocab_size=900), pad_id=0)
    exact, _ = _loss(FullVocab(), student, teacher, [batch], batch.num_tokens)
    head = student.model.get_output_embeddings().weight
    truth = head.grad
    objective = FullVocab(gradient_tolerance=1e-2)
    loss, _ = _loss(objective, student, teacher, [batch], batch.num_tokens)
    assert loss == exact
    law = student.law(batch)
    signal = objective(law, teacher.law(batch), batch, batch.num_tokens)
    dropped = signal.statistics["gradient_dropped_l1"]
    assert dropped.shape == (batch.num_tokens,)
    assert dropped.max() > 0
    # what the head's gradient may have lost, by the certificate
    bound = float((dropped * law.hidden().detach().norm(dim=1)).sum()) / batch.num_tokens
    error = float((head.grad - truth).norm(dim=1).sum())
    assert 0 < error <= bound * (1 + 1e-4)


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.num_elements = max(self.num_elements, leaf.numel())
        return out


@pytest.mark.parametrize(
    "objective", [FullVocab(), SampledToken(), TokenNll()], ids=lambda objective: objective.kind
)
def test_no_tensor_of_tokens_times_vocabulary_is_formed(hf_model, make_trajectories, objective):
    vocab_size, lengths = 2048, [(2, 30)] * 8
    pair = hf_model(seed=1, vocab_size=vocab_size), hf_model(seed=2, vocab_size=vocab_size)
    student = LanguageModel(pair[0], workspace_bytes=1 << 18)
    teacher = LocalTeacher(pair[1], name="teacher", workspace_bytes=1 << 18)
    batch = collate(make_trajectories(lengths, vocab_size=vocab_size), pad_id=0)
    with _Largest() as largest:
        taught = teacher.law(batch) if objective.needs_teacher else None
        objective(student.law(batch), taught, batch, batch.num_tokens).loss.backward()
    assert largest.num_elements < 0.5 * batch.num_tokens * vocab_size


def test_params_are_those_of_the_divergence():
    objective = FullVocab(divergence="jeffreys", params={"weight": 0.3})
    assert objective._divergence == opk.divergences.jeffreys(0.3)
    weights = FullVocab(divergence="concrete_score", params={"weights": ["uniform", "student"]})
    assert weights._divergence == opk.divergences.concrete_score(("uniform", "student"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"divergence": "jeffreys", "params": {"wait": 0.3}}, "unknown parameter 'wait'"),
        ({"divergence": "alpha", "alpha": 0.3, "params": {"alpha": 0.3}}, "alpha must be given"),
        ({"divergence": "cross_entropy"}, "cross_entropy has no teacher; use kind: token_nll"),
    ],
)
def test_params_are_checked(keys, message):
    with pytest.raises(ValueError, match=message):
        FullVocab(**keys)
