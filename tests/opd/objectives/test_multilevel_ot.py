# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.batch import Head, Law
from opd.objectives import MultilevelOt
from opd.objectives.standardized import column_sums, columns
from tests.memory import peak_bytes
from tests.opd.objectives.two_tokenizers import Case, check_hostile


def _law(rows, temperature):
    return (rows / (rows.std(1, keepdim=True) + 1e-4) / temperature).softmax(1)


def _sinkhorn(p, q, epsilon, num_iterations):
    cost = torch.stack([torch.stack([(x - y).abs().sum() for y in q]) for x in p])
    plan = (-cost / epsilon).exp()
    for _ in range(num_iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def _text(q, p, objective):
    """The loss of one text of as many positions on both sides, summed."""
    size = min(objective.num_topk, q.shape[1], p.shape[1])
    q, p = (x[:, x.sum(0).argsort(descending=True)[:size]] for x in (q, p))
    total = (p - q).abs().sum()
    total = total - objective.log_weight * (p.softmax(1) * q.softmax(1).log()).sum()
    smooth = ((x / 2).softmax(1) for x in (p, q))
    transport = _sinkhorn(*smooth, objective.epsilon, objective.num_iterations)
    return total + objective.sinkhorn_weight * transport


def _laws(case, objective):
    return [_law(rows, objective.temperature) for rows in case.rows()]


@pytest.mark.parametrize("bent", [False, True], ids=["plain", "bent"])
@pytest.mark.parametrize("num_topk", [3, 50])
def test_the_loss_is_the_textbook_sum(num_topk, bent):
    case = Case(bent=bent)
    objective = MultilevelOt(num_topk=num_topk, temperature=0.7, num_iterations=5, epsilon=0.2)
    q, p = _laws(case, objective)
    spans = list(case.spans())
    rows = [span[0] for _, span, _ in spans], [span[0] for _, _, span in spans]
    case.check(objective, _text(q[rows[0]], p[rows[1]], objective) / case.steps)


def test_positions_of_each_text_by_themselves():
    case = Case(num_tokens=7)
    ends = torch.tensor([3, 3, 7])
    sides = [replace(case.batch, segment_ends=ends) for _ in range(2)]
    case.batch = replace(sides[0], translation=replace(case.translation, batch=sides[1]))
    objective = MultilevelOt(pairing="positions", num_topk=4)

    def loss():
        q, p = _laws(case, objective)
        texts = ((0, 3), (3, 7))
        return sum(_text(q[begin:end], p[begin:end], objective) for begin, end in texts) / 8

    case.check(objective, loss(), num_step_tokens=8)
    # one tokenizer, no translation: the same of one vocabulary
    case.batch = replace(sides[0], translation=None)
    for pairing in ("positions", "chunks"):
        case.check(MultilevelOt(pairing=pairing, num_topk=4), loss(), num_step_tokens=8)


def test_a_small_workspace_changes_nothing_and_is_kept():
    losses = []
    for workspace_bytes in (1 << 30, 1):
        case = Case()
        for law in (case.student, case.teacher):
            law.workspace_bytes = workspace_bytes
        signal, gradients = case.run(MultilevelOt())
        losses.append((signal.loss.detach(), *gradients))
    for got, expected in zip(*losses, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_rows_of_logits_are_not_held():
    case = Case(num_tokens=200, dtype=torch.float32)
    wide, leaf = 4000, case.leaves[1]
    for name in ("student", "teacher"):
        law = getattr(case, name)
        weight = torch.randn(wide, law.head.weight.shape[1], requires_grad=name == "student")
        law.head = replace(law.head, weight=weight, bias=None)
        law.workspace_bytes = 1 << 20
    case.leaves = [case.leaves[0], case.student.head.weight]
    objective = MultilevelOt(sinkhorn_weight=0.0)
    whole = 4 * 200 * wide
    assert peak_bytes(lambda: case.run(objective)) < whole
    assert leaf is not case.leaves[1]


def test_cross_entropy_and_statistics():
    case = Case()
    signal, _ = case.run(MultilevelOt(cross_entropy_weight=1.0))
    plain, _ = case.run(MultilevelOt())
    nll = -case.rows()[0].log_softmax(-1).gather(1, case.ids[0][:, None]).sum() / 8
    torch.testing.assert_close(signal.loss - plain.loss, nll, rtol=1e-6, atol=1e-8)
    names = {"sorted_l1_topk", "cross_entropy_topk"}
    assert plain.statistics.keys() == names
    for values in plain.statistics.values():
        assert values.shape == (len(case.aligned),) and not values.requires_grad


def test_hostile_texts():
    check_hostile(MultilevelOt())
    check_hostile(MultilevelOt(pairing="chunks", num_topk=1, sinkhorn_weight=0.0))


@pytest.mark.parametrize("epsilon", [0.1, 1e-4])
def test_a_small_epsilon_has_the_gradients_of_the_exact_plan(epsilon):
    case = Case()
    objective = MultilevelOt(num_topk=3, num_iterations=5, epsilon=epsilon)
    signal, gradients = case.run(objective)
    assert bool(signal.loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.2]], dtype=torch.float64)
    left = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([[0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    cost = objective._sinkhorn(left, right)
    # each position is moved to the one that is nearest
    if epsilon < 0.01:
        assert cost.item() == pytest.approx(1.4, rel=1e-9)
    (gradient,) = torch.autograd.grad(cost, left)
    assert bool(gradient.isfinite().all())


def test_a_token_that_a_bias_rules_out_is_none():
    """The law and the gradients are those of the head without the token."""
    case = Case()
    ruled_out = 6
    kept = [i for i in range(8) if i != ruled_out]
    with torch.no_grad():
        case.leaves[2][ruled_out] = -torch.inf
        case.leaves[1][ruled_out] = 0.0
    hidden, weight, bias = (leaf.detach().clone() for leaf in case.leaves)
    leaves = [x.requires_grad_() for x in (hidden, weight[kept], bias[kept])]
    ids = (
        torch.tensor([[0, 2], [3, 5]]),
        torch.tensor([[kept.index(i) for i in row] for row in ([0, 2], [3, 5])]),
    )
    out = columns(case.student, case.leaves[0][:2], ids[0])
    law = Law(lambda: leaves[0], Head(leaves[1], leaves[2]))
    expected = columns(law, leaves[0][:2], ids[1])
    torch.testing.assert_close(out, expected)
    upstream = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=out.dtype)
    got = torch.autograd.grad(out, case.leaves, upstream)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    torch.testing.assert_close(got[0], wanted[0])
    for one, two in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one[kept], two)
        assert not one[ruled_out].any()
    signal, gradients = case.run(MultilevelOt())
    assert bool(signal.loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_vocabulary_of_one_token_is_certain_of_it():
    hidden, weight = (torch.ones(3, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True))
    law = Law(lambda: hidden, Head(weight, torch.zeros(1)))
    out = columns(law, hidden, torch.zeros(3, 1, dtype=torch.int64))
    assert torch.equal(out, torch.ones(3, 1))
    assert torch.equal(
        column_sums(law, hidden, torch.tensor([0, 0, 1])), torch.tensor([[2.0], [1.0]])
    )
    for gradient in torch.autograd.grad(out.sum(), (hidden, weight)):
        assert not gradient.any()
