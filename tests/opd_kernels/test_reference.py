# SPDX-License-Identifier: Apache-2.0
"""The reference against hand-computed and published numbers, and against itself at the edges."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import reference, targets
from opd_kernels.reference.divergence import statistics
from tests.cases import INF, LIMIT_SPECS, NAN, SPECS, spec
from tests.golden import GOLDEN, GOLDEN_TARGETS, PAIRS

F64 = torch.float64
EVERY = list(dict.fromkeys((*SPECS, *LIMIT_SPECS)))


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


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("golden", list(GOLDEN_TARGETS), ids=str)
def test_reference_has_the_golden_values_of_targets(golden, pair):
    divergence, coefficients = golden
    teacher, student = PAIRS[pair]
    value, gradient = GOLDEN_TARGETS[golden][pair]
    student_logits = logits(student).log().requires_grad_()
    loss = reference.divergence(
        student_logits,
        logits(teacher).log(),
        divergence=divergence,
        target=targets.geometric(*coefficients),
        reference_logits=torch.zeros_like(student_logits),
    )
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


@pytest.mark.parametrize("divergence", EVERY, ids=str)
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


# infinite where the student has given up a token of the teacher's, or the other way round
INFINITE = {
    "student": (
        spec("forward_kl"), spec("jeffreys"), spec("alpha", alpha=1.5), spec("renyi", alpha=2.0),
        spec("pearson_chi2"), spec("todi"), spec("adaptive_kl"),
        spec("alpha_beta", alpha=1.0, beta=0.0),
        spec("alpha_beta", alpha=0.4, beta=0.0), spec("alpha_beta", alpha=0.5, beta=-0.5),
        spec("alpha_beta", alpha=0.8, beta=-0.3), spec("alpha_beta", alpha=0.0, beta=0.0),
        spec("concrete_score", weights=("teacher", "student")),
    ),
    "teacher": (
        spec("reverse_kl"), spec("jeffreys"), spec("alpha", alpha=-0.5), spec("neyman_chi2"),
        spec("todi"), spec("adaptive_kl"), spec("alpha_beta", alpha=0.0, beta=1.0),
        spec("alpha_beta", alpha=0.0, beta=0.7), spec("alpha_beta", alpha=0.5, beta=-0.5),
        spec("alpha_beta", alpha=-0.3, beta=0.8), spec("alpha_beta", alpha=0.0, beta=0.0),
        spec("alpha_beta", alpha=-0.5, beta=-0.5),
        spec("concrete_score"), spec("concrete_score", weights=("teacher", "student")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("divergence", list(dict.fromkeys(sum(INFINITE.values(), ()))), ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_reference_is_infinite_where_the_definition_is(divergence, side):
    full, cut = logits([0.0, 1.0, 2.0]), logits([0.0, 1.0, -INF])
    pair = (cut, full) if side == "student" else (full, cut)
    loss = reference.divergence(*pair, divergence=divergence).item()
    both_sides = spec("alpha_beta", alpha=-0.5, beta=-0.5)
    if divergence in INFINITE[side] or divergence == both_sides:
        assert loss == INF
    else:
        assert 0 < loss < INF


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_reference_is_not_stopped_by_probabilities_that_underflow(divergence):
    # e^-1000 is 0: no NaN, though quotients of such probabilities exist
    pair = logits([0.0, 1.0, -1000.0]).requires_grad_(), logits([0.5, 0.0, -1001.0])
    shorter = logits([0.0, 1.0]), logits([0.5, 0.0])
    loss = reference.divergence(*pair, divergence=divergence)
    loss.sum().backward()
    assert pair[0].grad.isfinite().all()
    gap_counts = divergence.name == "concrete_score" or (
        divergence.name == "alpha_beta" and sum(v for _, v in divergence.params) == 0
    )
    if not gap_counts:
        expected = reference.divergence(*shorter, divergence=divergence)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("divergence", EVERY, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_reference_propagates_nan(divergence, side):
    clean, dirty = logits([0.0, 1.0, 2.0]), logits([0.0, NAN, 2.0])
    pair = (dirty, clean) if side == "student" else (clean, dirty)
    assert reference.divergence(*pair, divergence=divergence).isnan().all()


@pytest.mark.parametrize("divergence", EVERY, ids=str)
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
