# SPDX-License-Identifier: Apache-2.0
"""The reference against hand-computed and published numbers, and against itself at the edges."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import reference
from opd_kernels.reference.divergence import statistics
from tests.cases import INF, NAN, SPECS, spec
from tests.golden import GOLDEN, PAIRS

F64 = torch.float64


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("golden", list(GOLDEN), ids=str)
def test_reference_has_the_golden_values(golden, pair):
    teacher, student = PAIRS[pair]
    value, gradient = GOLDEN[golden][pair]
    student_logits = logits(student).log().requires_grad_()
    loss = reference.divergence(student_logits, logits(teacher).log(), divergence=golden)
    loss.sum().backward()
    torch.testing.assert_close(loss, logits([value])[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(student_logits.grad, logits(gradient), rtol=0, atol=1e-8)


def test_reference_orientation_by_hand():
    # P = (3/4, 1/4), Q = (1/2, 1/2): KL(P || Q) = 3/4 log 3/2 - 1/4 log 2
    teacher, student = logits([0.75, 0.25]).log(), logits([0.5, 0.5]).log()
    forward = reference.divergence(student, teacher, divergence="forward_kl")
    reverse = reference.divergence(student, teacher, divergence="reverse_kl")
    log = torch.tensor([1.5, 2.0, 2 / 3], dtype=F64).log()
    torch.testing.assert_close(forward[0], 0.75 * log[0] - 0.25 * log[1])
    torch.testing.assert_close(reverse[0], 0.5 * log[2] + 0.5 * log[1])


@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_reference_takes_minus_infinity_on_both_sides(divergence):
    # the third token does not exist for either: the result is that of the first two alone
    pair = logits([0.3, -0.2]).requires_grad_(), logits([-1.0, 0.5])
    triple = logits([0.3, -0.2, -INF]).requires_grad_(), logits([-1.0, 0.5, -INF])
    expected = reference.divergence(*pair, divergence=divergence)
    actual = reference.divergence(*triple, divergence=divergence)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
    expected.sum().backward()
    actual.sum().backward()
    torch.testing.assert_close(triple[0].grad[:, :2], pair[0].grad, rtol=0, atol=1e-15)
    assert triple[0].grad[0, 2] == 0


@pytest.mark.parametrize(
    ("name", "infinite"),
    [("forward_kl", "student"), ("reverse_kl", "teacher")],
)
def test_reference_is_infinite_where_the_definition_is(name, infinite):
    full, cut = logits([0.0, 1.0, 2.0]), logits([0.0, 1.0, -INF])
    pair = (cut, full) if infinite == "student" else (full, cut)
    assert reference.divergence(*pair, divergence=name).item() == INF
    assert reference.divergence(*reversed(pair), divergence=name).isfinite().all()


@pytest.mark.parametrize("divergence", SPECS, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_reference_propagates_nan(divergence, side):
    clean, dirty = logits([0.0, 1.0, 2.0]), logits([0.0, NAN, 2.0])
    pair = (dirty, clean) if side == "student" else (clean, dirty)
    assert reference.divergence(*pair, divergence=divergence).isnan().all()


@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_reference_gives_exact_zero_for_weight_zero_over_nan(divergence):
    student = logits([0.0, 1.0], [NAN, NAN]).requires_grad_()
    teacher = logits([1.0, 0.0], [NAN, 1.0])
    weights = torch.tensor([0.5, 0.0])
    loss = reference.divergence(student, teacher, divergence=divergence, token_weights=weights)
    loss.sum().backward()
    assert loss[1] == 0 and loss[0] > 0
    assert student.grad[1].tolist() == [0.0, 0.0]


def test_reference_fused_equals_unfused():
    torch.manual_seed(3)
    hidden, head = torch.randn(5, 4, dtype=F64), torch.randn(7, 4, dtype=F64)
    teacher_hidden, teacher_head = torch.randn(5, 6, dtype=F64), torch.randn(7, 6, dtype=F64)
    weights = torch.rand(5)
    out = reference.fused_linear_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        divergence=spec("jsd", beta=0.3),
        token_weights=weights,
        reduction="none",
        statistics=("student_lse", "forward_kl"),
    )
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    expected = reference.divergence(
        student, teacher, divergence=spec("jsd", beta=0.3), token_weights=weights
    )
    torch.testing.assert_close(out.loss, expected, rtol=0, atol=0)
    assert set(out.statistics) == {"student_lse", "forward_kl"}
    torch.testing.assert_close(out.statistics["student_lse"], student.logsumexp(-1))


def test_reference_statistics_by_hand():
    teacher, student = logits([0.75, 0.25]).log(), logits([0.5, 0.5]).log()
    named = statistics(student, teacher)
    assert named["student_entropy"].item() == pytest.approx(0.6931471805599453, abs=1e-15)
    assert named["teacher_entropy"].item() == pytest.approx(0.5623351446188083, abs=1e-15)
    assert named["forward_kl"].item() == pytest.approx(0.13081203594113694, abs=1e-15)
    # ties go to the first index, on both sides
    assert named["top1_agreement"].item() == 1.0
    assert named["student_lse"].item() == pytest.approx(0.0, abs=1e-15)


def test_reference_token_logprobs_by_hand():
    out = reference.token_logprobs(logits([0.0, 2.0, -INF]), torch.tensor([1]), temperature=2.0)
    # logits / 2 = (0, 1, -inf)
    lse = torch.tensor([1.0 + torch.e], dtype=F64).log()
    torch.testing.assert_close(out.lse, lse, rtol=0, atol=1e-15)
    torch.testing.assert_close(out.logprobs, 1 - lse, rtol=0, atol=1e-15)
    torch.testing.assert_close(out.entropy, lse - torch.e / (1 + torch.e), rtol=0, atol=1e-15)
