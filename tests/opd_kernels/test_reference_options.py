# SPDX-License-Identifier: Apache-2.0
"""The reference's options, each against the same thing written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_kernels import reference, targets
from opd_kernels.reference.divergence import statistics
from tests.cases import INF, LIMIT_SPECS, NAN, SPECS, spec

F64 = torch.float64
EVERY = list(dict.fromkeys((*SPECS, *LIMIT_SPECS)))


def rows(num_tokens: int = 4, vocab_size: int = 9, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, vocab_size)
    return tuple(torch.randn(shape, generator=generator, dtype=F64) * 2 for _ in range(3))


def value_and_gradient(student: Tensor, teacher: Tensor, **keywords) -> tuple[Tensor, Tensor]:
    z = student.clone().requires_grad_()
    loss = reference.divergence(z, teacher, **keywords)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for got, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)


# -- what is done to the logits ------------------------------------------------------------------


def test_temperature_per_token_is_each_row_at_its_own():
    student, teacher, _ = rows()
    temperature = torch.tensor([0.5, 1.0, 2.0, 3.0])
    together = value_and_gradient(student, teacher, temperature=temperature)
    one_by_one = [
        value_and_gradient(student[t : t + 1], teacher[t : t + 1], temperature=float(value))
        for t, value in enumerate(temperature)
    ]
    assert_same(together, tuple(torch.cat(part) for part in zip(*one_by_one, strict=True)))


def test_temperature_pairs_mix_numbers_and_tensors():
    student, teacher, _ = rows()
    ones = torch.ones(4)
    expected = value_and_gradient(student, teacher, temperature=(0.5, 2.0))
    for pair in ((0.5 * ones, 2.0), (0.5, 2.0 * ones), [0.5 * ones, 2.0 * ones]):
        assert_same(value_and_gradient(student, teacher, temperature=pair), expected)


def test_softcap_and_scale_come_before_the_temperature():
    student, teacher, _ = rows()
    z = student.clone().requires_grad_()
    by_hand = reference.divergence(
        5.0 * torch.tanh(0.3 * z / 5.0) / 0.7, 6.0 * torch.tanh(0.4 * teacher / 6.0) / 0.8
    )
    (gradient,) = torch.autograd.grad(by_hand.sum(), z)
    actual = value_and_gradient(
        student,
        teacher,
        student_softcap=5.0,
        teacher_softcap=6.0,
        student_logit_scale=0.3,
        teacher_logit_scale=0.4,
        temperature=(0.7, 0.8),
    )
    assert_same(actual, (by_hand.detach(), gradient))


def test_reference_model_has_its_own_softcap_and_the_teachers_temperature():
    student, teacher, third = rows()
    target = targets.geometric(0.2, 1.25, -0.25)
    third_scaled = 4.0 * torch.tanh(0.6 * third / 4.0) / 0.8
    fixed = 0.2 * student / 0.7 + 1.25 * teacher / 0.8 - 0.25 * third_scaled
    expected = value_and_gradient(student, fixed, temperature=(0.7, 1.0))
    actual = value_and_gradient(
        student,
        teacher,
        target=target,
        reference_logits=third,
        reference_softcap=4.0,
        reference_logit_scale=0.6,
        temperature=(0.7, 0.8),
    )
    assert_same(actual, expected)


def test_fused_linear_adds_bias_and_lora_to_the_raw_logits():
    torch.manual_seed(5)
    hidden, head, bias = (torch.randn(s, dtype=F64) for s in ((3, 4), (7, 4), (7,)))
    down, up = torch.randn(2, 4, dtype=F64), torch.randn(9, 2, dtype=F64)
    teacher_hidden, teacher_head = torch.randn(3, 5, dtype=F64), torch.randn(7, 5, dtype=F64)
    teacher_bias = torch.randn(8, dtype=F64)
    teacher_bias[7], up[7:] = NAN, NAN
    leaves = [x.requires_grad_() for x in (hidden, head, bias, down, up)]
    out = reference.fused_linear_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        student_bias=bias,
        teacher_bias=teacher_bias,
        student_lora=(down, up, 0.5),
        student_softcap=3.0,
        student_logit_scale=0.4,
        vocab_size=7,
        reduction="none",
    )
    logits = hidden @ head.T + 0.5 * (hidden @ down.T) @ up[:7].T + bias
    expected = reference.divergence(
        logits,
        teacher_hidden @ teacher_head.T + teacher_bias[:7],
        student_softcap=3.0,
        student_logit_scale=0.4,
    )
    torch.testing.assert_close(out.loss, expected)
    actual = torch.autograd.grad(out.loss.sum(), leaves)
    for got, exact in zip(actual, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(got, exact)
    assert actual[4][7:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_fused_linear_reference_model():
    torch.manual_seed(6)
    pairs = [torch.randn(s, dtype=F64) for s in ((3, 4), (7, 4), (3, 5), (7, 5), (3, 6), (7, 6))]
    bias = torch.randn(7, dtype=F64)
    target = targets.geometric(teacher=1.3, reference=-0.3)
    out = reference.fused_linear_divergence(
        *pairs[:4],
        target=target,
        reference_hidden=pairs[4],
        reference_lm_head_weight=pairs[5],
        reference_bias=bias,
        reduction="none",
        statistics=("teacher_entropy",),
    )
    student, teacher, third = (pairs[i] @ pairs[i + 1].T for i in (0, 2, 4))
    fixed = 1.3 * teacher - 0.3 * (third + bias)
    torch.testing.assert_close(out.loss, reference.divergence(student, fixed))
    entropy = torch.distributions.Categorical(logits=fixed).entropy()
    torch.testing.assert_close(out.statistics["teacher_entropy"], entropy)


# -- sums and labels -----------------------------------------------------------------------------


def test_sum_is_the_sum_of_its_components():
    student, teacher, _ = rows()
    per_token = torch.tensor([0.5, -1.0, 0.0, 2.0])
    parts = [(0.3, "forward_kl"), (per_token, spec("jsd", beta=0.2)), (-0.1, "total_variation")]
    value, gradient = value_and_gradient(student, teacher, divergence=parts)
    expected = [torch.zeros(4, dtype=F64), torch.zeros(4, 9, dtype=F64)]
    for coefficient, name in parts:
        one = value_and_gradient(student, teacher, divergence=name)
        column = coefficient * torch.ones(4, dtype=F64)
        expected[0] += column * one[0]
        expected[1] += column.unsqueeze(1) * one[1]
    assert_same((value, gradient), tuple(expected))


@pytest.mark.parametrize("divergence", EVERY, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_sum_leaves_out_a_component_of_coefficient_zero_whatever_it_is(divergence, side):
    student, teacher, _ = rows()
    cut = student if side == "student" else teacher
    cut[1, 3] = -INF
    cut[2] = NAN
    coefficient = torch.tensor([1.0, 0.0, 0.0, 2.0])
    value, gradient = value_and_gradient(student, teacher, divergence=[(coefficient, divergence)])
    assert value[1:3].tolist() == [0.0, 0.0] and bool((value[[0, 3]] > 0).all())
    assert gradient[1:3].abs().max() == 0 and gradient.isfinite().all()


def test_weight_zero_leaves_out_a_row_whatever_its_temperature_target_or_label_is():
    student, teacher, third = rows()
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    student[1], teacher[3], third[1] = NAN, NAN, INF
    keywords = {
        "divergence": [(1.0, "jsd"), (torch.tensor([1.0, NAN, 1.0, 1.0]), "cross_entropy")],
        "temperature": torch.tensor([1.0, 0.0, 2.0, NAN]),
        "labels": torch.tensor([3, 100, 4, -100]),
        "token_weights": weights,
    }
    for target in (
        targets.geometric(0.1, 0.9, 0.2),
        targets.mixture(torch.tensor([0.5, NAN, 0.2, 0.1])),
    ):
        value, gradient = value_and_gradient(
            student, teacher, target=target, reference_logits=third, **keywords
        )
        assert value[[1, 3]].tolist() == [0.0, 0.0] and value.isfinite().all()
        assert gradient[[1, 3]].abs().max() == 0 and gradient.isfinite().all()


def test_labels_are_one_or_several_per_token():
    student, teacher, _ = rows()
    logprobs = torch.log_softmax(student, -1)
    one = reference.divergence(
        student, teacher, divergence="cross_entropy", labels=torch.tensor([2, -100, 0, 8])
    )
    expected = -torch.stack([logprobs[0, 2], 0 * logprobs[1, 0], logprobs[2, 0], logprobs[3, 8]])
    torch.testing.assert_close(one, expected)
    several = reference.divergence(
        student,
        teacher,
        divergence="cross_entropy",
        labels=torch.tensor([[2, 2], [0, 1], [-1, 0], [8, 7]]),
        label_weights=torch.tensor([[0.25, 0.75], [0.5, 0.0], [NAN, 1.0], [1.0, -1.0]]),
    )
    expected[1] = -0.5 * logprobs[1, 0]
    expected[3] += logprobs[3, 7]
    torch.testing.assert_close(several, expected)


def test_cross_entropy_ignores_the_target_and_a_label_of_weight_zero():
    student, teacher, _ = rows()
    student[:, 5] = -INF
    labels, weights = torch.tensor([[5, 1]] * 4), torch.tensor([[0.0, 1.0]] * 4)
    keywords = {"divergence": "cross_entropy", "labels": labels, "label_weights": weights}
    plain = value_and_gradient(student, teacher, **keywords)
    mixed = value_and_gradient(student, teacher, target=targets.mixture(0.5), **keywords)
    assert_same(mixed, plain)
    assert plain[0].isfinite().all()
    keywords["label_weights"] = None
    infinite = reference.divergence(student, teacher, **keywords)
    assert infinite.tolist() == [INF] * 4


# -- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_trivial_targets_are_the_teacher(divergence):
    student, teacher, _ = rows()
    expected = value_and_gradient(student, teacher, divergence=divergence)
    for target in (
        targets.geometric(),
        targets.geometric(0.0, 1.0, 0.0, detach=False),
        targets.mixture(1.0),
        targets.mixture(torch.ones(4), detach=False),
    ):
        actual = value_and_gradient(student, teacher, divergence=divergence, target=target)
        assert_same(actual, expected)


def test_geometric_target_does_not_read_a_model_of_coefficient_zero():
    student, teacher, third = rows()
    expected = value_and_gradient(student, third, divergence="forward_kl")
    teacher[:] = NAN
    actual = value_and_gradient(
        student,
        teacher,
        divergence="forward_kl",
        target=targets.geometric(0.0, 0.0, 1.0),
        reference_logits=third,
    )
    assert_same(actual, expected)


def test_geometric_target_has_no_token_that_one_of_its_models_excludes():
    student, teacher, third = rows()
    teacher[:, 3], third[:, 3] = -INF, -INF
    target = targets.geometric(0.0, 1.25, -0.25)
    actual = value_and_gradient(
        student, teacher, divergence="forward_kl", target=target, reference_logits=third
    )
    keep = [0, 1, 2, 4, 5, 6, 7, 8]
    fixed = 1.25 * teacher - 0.25 * third
    fixed[:, 3] = -INF
    assert_same(actual, value_and_gradient(student, fixed, divergence="forward_kl"))
    assert fixed[:, keep].isfinite().all() and actual[1].isfinite().all()


def test_mixture_target_is_a_law_where_one_side_has_nothing():
    student, teacher, _ = rows()
    student[:, 2], teacher[:, 3] = -INF, -INF
    student[:, 4], teacher[:, 4] = -INF, -INF
    value, gradient = value_and_gradient(
        student, teacher, divergence="reverse_kl", target=targets.mixture(0.5, detach=False)
    )
    assert value.isfinite().all() and gradient.isfinite().all()
    skew = value_and_gradient(student, teacher, divergence=spec("skew_reverse_kl", alpha=0.5))
    assert_same((value, gradient), skew)


# -- statistics ----------------------------------------------------------------------------------


def test_statistics_of_chosen_tokens_by_hand():
    student, teacher, _ = rows()
    ids, topk = torch.tensor([0, 8, 3, 3]), torch.tensor([[1, 2], [-1, 5], [-1, -1], [0, 8]])
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0])
    named = statistics(
        student,
        teacher,
        token_ids=ids,
        topk_ids=topk,
        token_weights=weights,
        temperature=(0.5, 2.0),
    )
    for side, logits, temperature in (("student", student, 0.5), ("teacher", teacher, 2.0)):
        probs = torch.softmax(logits / temperature, -1)
        chosen = [float(probs[t, int(v)].log()) for t, v in enumerate(ids)]
        mass = [float(probs[t, [v for v in row if v >= 0]].sum()) for t, row in enumerate(topk)]
        assert named[f"{side}_logprobs"].tolist() == pytest.approx([*chosen[:3], 0.0], abs=1e-15)
        assert named[f"{side}_topk_mass"].tolist() == pytest.approx([*mass[:3], 0.0], abs=1e-15)
    assert named["student_topk_mass"][2] == 0


def test_statistics_are_of_a_geometric_target_and_of_the_teacher_before_a_mixture():
    student, teacher, third = rows()
    target = targets.geometric(0.5, 0.7, 0.1, detach=False)
    ids, topk = torch.tensor([0, 8, 3, 3]), torch.tensor([[1, 2]] * 4)
    chosen = {"token_ids": ids, "topk_ids": topk}
    fixed = 0.5 * student + 0.7 * teacher + 0.1 * third
    actual = statistics(student, teacher, target=target, reference_logits=third, **chosen)
    for name, value in statistics(student, fixed, **chosen).items():
        torch.testing.assert_close(actual[name], value)
    plain = statistics(student, teacher, **chosen)
    mixed = statistics(student, teacher, target=targets.mixture(0.3), **chosen)
    assert len(plain) == 11
    for name, value in plain.items():
        assert torch.equal(mixed[name], value), name
