# SPDX-License-Identifier: Apache-2.0
"""Targets, sums, labels, softcap, scale and per-row temperatures of the ops, against the reference.

Float64, where an error of formula cannot hide in rounding; test_divergence.py holds the precision.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import opd_kernels as opk
from opd_kernels import divergences as D
from opd_kernels import reference, targets
from tests.cases import BF16, F32, F64, INF, NAN, SPECS
from tests.checks import dtype_id, leaf

NUM_TOKENS, VOCAB = 7, 700
every_divergence = pytest.mark.parametrize("divergence", SPECS, ids=str)


def laws(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(NUM_TOKENS, VOCAB, generator=generator, dtype=F64) * 2
    teacher = student + torch.randn(NUM_TOKENS, VOCAB, generator=generator, dtype=F64)
    rows = torch.rand(NUM_TOKENS, generator=generator, dtype=F64) + 0.5
    coefficients = torch.randn(NUM_TOKENS, generator=generator, dtype=F64)
    coefficients[2] = 0.0
    labels = torch.randint(VOCAB, (NUM_TOKENS, 3), generator=generator)
    labels[1, 1] = -100
    return {
        "student": student,
        "teacher": teacher,
        "reference": teacher + torch.randn(NUM_TOKENS, VOCAB, generator=generator, dtype=F64),
        "rows": rows,
        "coefficients": coefficients,
        "labels": labels,
        "label_weights": torch.rand(NUM_TOKENS, 3, generator=generator, dtype=F64),
    }


LAWS = laws()
ROWS, COEFFICIENTS = LAWS["rows"], LAWS["coefficients"]
REFERENCE = {"reference_logits": LAWS["reference"]}
TRANSFORMS = {
    "student_softcap": 5.0,
    "teacher_softcap": 3.0,
    "student_logit_scale": 0.7,
    "teacher_logit_scale": 1.3,
    "temperature": (ROWS, 2.0),
    "token_weights": ROWS,
}
LABELS = {"labels": LAWS["labels"], "label_weights": LAWS["label_weights"]}


def check(**keywords) -> None:
    ours, theirs = leaf(LAWS["student"]), leaf(LAWS["student"])
    loss = opk.divergence(ours, LAWS["teacher"], backend="cpu", **keywords)
    truth = reference.divergence(theirs, LAWS["teacher"], **keywords)
    upstream = torch.linspace(-1.0, 2.0, NUM_TOKENS, dtype=F64)
    loss.backward(upstream)
    truth.backward(upstream)
    torch.testing.assert_close(loss.detach(), truth.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)


@every_divergence
def test_divergence_softcap_scale_and_temperature_per_row(divergence):
    check(divergence=divergence.public(), **TRANSFORMS)


@every_divergence
@pytest.mark.parametrize("detach", [True, False])
def test_divergence_to_a_geometric_target(divergence, detach):
    target = targets.geometric(0.4, 0.5, 0.2, detach=detach)
    check(divergence=divergence.public(), target=target, **REFERENCE)
    check(
        divergence=divergence.public(),
        target=target,
        reference_softcap=4.0,
        reference_logit_scale=1.5,
        **TRANSFORMS,
        **REFERENCE,
    )


@every_divergence
@pytest.mark.parametrize("detach", [True, False])
def test_divergence_to_a_mixture(divergence, detach):
    weights = ROWS.clamp(max=1.0)
    weights[0], weights[3] = 0.0, 1.0
    for weight in (weights, 0.3):
        target = targets.mixture(weight, detach=detach)
        check(divergence=divergence.public(), target=target, temperature=(0.7, 1.3))


def test_divergence_sums_with_coefficients_per_row():
    total = [
        (COEFFICIENTS, "forward_kl"),
        (0.3, D.jsd(0.2)),
        (-1.0, D.renyi(0.3)),
        (COEFFICIENTS, "pearson_chi2"),
        (ROWS, D.skew_forward_kl(0.2)),
    ]
    check(divergence=total)
    check(divergence=total, target=targets.geometric(0.4, 0.6, detach=False), **TRANSFORMS)
    check(divergence=total, target=targets.mixture(ROWS.clamp(max=1.0), detach=False))


@pytest.mark.parametrize("target", [None, targets.mixture(0.3, detach=False)])
def test_divergence_cross_entropy(target):
    check(divergence="cross_entropy", labels=LAWS["labels"][:, 0], target=target)
    check(divergence="cross_entropy", target=target, **LABELS)
    mixed = [(0.5, "cross_entropy"), (COEFFICIENTS, "forward_kl")]
    check(divergence=mixed, target=target, **LABELS, **TRANSFORMS)


def test_divergence_cross_entropy_counts_a_repeated_label_twice():
    check(divergence="cross_entropy", labels=torch.full((NUM_TOKENS, 3), 5))


@pytest.mark.parametrize(
    "divergence",
    [
        *(
            D.alpha_beta(*pair)
            for pair in [
                (1, 0), (0, 1), (0.5, 0.5), (0, 0.7), (0.4, 0), (0.5, -0.5), (-0.3, 0.8), (0, 0)
            ]
        ),
        *(D.alpha(order) for order in (-1.0, -0.5, 0.3, 1.5, 2.0, 3.0)),
        *(D.renyi(order) for order in (0.01, 0.3, 0.99, 2.0)),
        *(D.adaptive_kl(mass) for mass in (0.01, 0.1, 0.9, 0.999)),
        *(
            D.concrete_score(pair)
            for pair in itertools.product(("student", "teacher", "uniform"), repeat=2)
        ),
    ],
    ids=str,
)  # fmt: skip
def test_divergence_parameters(divergence):
    check(divergence=divergence)


def test_divergence_adaptive_kl_keeps_tied_tokens_together():
    # masses .4 .2 .2 .2: at a head mass of .5 no one of the three fits without the others
    teacher = torch.tensor([[0.4, 0.2, 0.2, 0.2]], dtype=F64).log()
    student = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=F64).log()
    for mass in (0.3, 0.41, 0.5, 0.99):
        ours = opk.divergence(student, teacher, divergence=D.adaptive_kl(mass))
        truth = reference.divergence(student, teacher, divergence=D.adaptive_kl(mass))
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    forward, reverse = (
        opk.divergence(student, teacher, divergence=name) for name in ("forward_kl", "reverse_kl")
    )
    head = abs(0.4 - 0.1)
    tail = 0.0 + 0.1 + 0.2
    expected = (head * forward + tail * reverse) / (head + tail)
    ours = opk.divergence(student, teacher, divergence=D.adaptive_kl(0.5))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_divergence_coefficient_zero_leaves_out_infinity():
    student = torch.zeros(2, 3)
    teacher = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, 1.0]])
    logits = leaf(student)
    coefficients = torch.tensor([0.0, 1.0])
    loss = opk.divergence(
        logits, teacher, divergence=[(coefficients, "reverse_kl"), (1.0, "forward_kl")]
    )
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert bool(logits.grad.isfinite().all())
    alone = opk.divergence(student, teacher, divergence="forward_kl")
    assert loss[0] == alone[0]


@every_divergence
def test_divergence_nan_stays_in_its_row(divergence):
    student, teacher = LAWS["student"].float(), LAWS["teacher"].float()
    for spoiled in ("student", "teacher"):
        logits, law = leaf(student), teacher.clone()
        with torch.no_grad():
            (logits if spoiled == "student" else law)[3, 5] = NAN
        loss = opk.divergence(logits, law, divergence=divergence.public())
        loss.sum().backward()
        clean = torch.arange(NUM_TOKENS) != 3
        whole = leaf(student)
        expected = opk.divergence(whole, teacher, divergence=divergence.public())
        expected.sum().backward()
        assert bool(loss[3].isnan()), spoiled
        assert torch.equal(loss[clean], expected[clean])
        assert torch.equal(logits.grad[clean], whole.grad[clean])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("exponents", [(0.0, 0.0), (0.0, 1.0), (0.0, 0.5), (1.0, 0.0), (0.5, -0.5)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_exponent_of_zero_does_not_leave_out_nan(backend, exponents, request):
    if backend == "triton":
        request.getfixturevalue("interpreted_triton")
    for spoiled in (0, 1):
        logits = torch.randn(2, 2, 50)
        logits[spoiled, 1, 3] = NAN
        student = leaf(logits[0])
        divergence = D.alpha_beta(*exponents)
        loss = opk.divergence(student, logits[1], divergence=divergence, backend=backend)
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, True], spoiled
        assert student.grad.isnan().all(dim=1).tolist() == [False, True], spoiled


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_divergence_softcap_of_huge_logits_has_no_slope(dtype):
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.zeros(1, 3, dtype=dtype)
    loss = opk.divergence(student, teacher, divergence="forward_kl", student_softcap=30.0)
    loss.sum().backward()
    assert bool(student.grad.isfinite().all())
    assert student.grad[0, :2].tolist() == [0.0, 0.0]
    plain = opk.divergence(torch.tensor([[30.0, -30.0, 0.0]]), teacher.float())
    capped = opk.divergence(student.detach().float(), teacher.float(), student_softcap=30.0)
    torch.testing.assert_close(capped, plain)


def test_divergence_target_rules_out_what_one_of_its_laws_rules_out():
    student = torch.zeros(1, 3, dtype=F64)
    teacher = torch.tensor([[0.0, 0.0, -INF]], dtype=F64)
    behind = torch.tensor([[0.0, 1.0, -INF]], dtype=F64)
    # 1.25 * -inf - 0.25 * -inf is no number, but the token is in neither law
    loss = opk.divergence(
        student,
        teacher,
        divergence="forward_kl",
        target=targets.geometric(teacher=1.25, reference=-0.25),
        reference_logits=behind,
    )
    kept = opk.divergence(
        torch.zeros(1, 2, dtype=F64),
        torch.tensor([[0.0, -0.25]], dtype=F64),
        divergence="forward_kl",
    )
    # over three tokens instead of two the student is log(3 / 2) further away
    torch.testing.assert_close(loss, kept + torch.log(torch.tensor(1.5, dtype=F64)))


def _call(**changes):
    arguments = {"divergence": "jsd", **changes}
    return opk.divergence(LAWS["student"], LAWS["teacher"], **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": LAWS["labels"]}, ValueError, "labels must be given with cross_entropy and"),
        ({"divergence": "cross_entropy"}, ValueError, "cross_entropy and only then, got .*None"),
        ({"label_weights": ROWS}, ValueError, "label_weights must come with labels"),
        (
            {"divergence": "cross_entropy", "labels": LAWS["labels"], "label_weights": ROWS},
            ValueError,
            r"label_weights must have the shape of labels \(7, 3\), got \(7, 1\)",
        ),
        (
            {
                "divergence": "cross_entropy",
                "labels": LAWS["labels"],
                "label_weights": LAWS["label_weights"].clone().requires_grad_(),
            },
            ValueError,
            "label_weights must not require grad",
        ),
        (
            {"divergence": "cross_entropy", "labels": LAWS["labels"].float()},
            TypeError,
            "labels must be int64 or int32",
        ),
        (
            {"divergence": "cross_entropy", "labels": LAWS["labels"][:3]},
            ValueError,
            "labels must have 7 rows",
        ),
        (
            {"divergence": "cross_entropy", "labels": torch.full((7,), VOCAB)},
            RuntimeError,
            f"labels must be below {VOCAB}, got {VOCAB}",
        ),
        ({"student_softcap": 0.0}, ValueError, "student_softcap must be positive"),
        ({"teacher_softcap": "30"}, TypeError, "teacher_softcap must be a number"),
        ({"student_logit_scale": 0.0}, ValueError, "student_logit_scale must be finite and not 0"),
        ({"teacher_logit_scale": INF}, ValueError, "teacher_logit_scale must be finite"),
        ({"teacher_logit_scale": None}, TypeError, "teacher_logit_scale must be a number"),
        ({"temperature": ROWS[:3]}, ValueError, "temperature must have 7 rows"),
        (
            {"temperature": ROWS.clone().requires_grad_()},
            ValueError,
            "temperature must not require grad",
        ),
        ({"target": "teacher"}, TypeError, r"target must be targets.geometric\(\.\.\.\)"),
        (
            {"target": targets.geometric(reference=0.5)},
            ValueError,
            "a reference model must be given with a geometric target that weighs it",
        ),
        (
            {"reference_logits": LAWS["reference"]},
            ValueError,
            "and only then, got target None and a reference",
        ),
        ({"target": targets.mixture(ROWS[:2])}, ValueError, "teacher_weight of the mixture must"),
        ({"divergence": [(1.0, "jsd")] * 17}, ValueError, "a sum of at most 16, got 17"),
        (
            {"divergence": [(ROWS[:2], "jsd")]},
            ValueError,
            "coefficient of the divergence must have 7 rows",
        ),
    ],
)
def test_divergence_options_reject_in_words(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes)


# -- what a hostile reviewer found ---------------------------------------------------------------


@pytest.mark.parametrize(("order", "apart"), [(2.0, 100.0), (3.0, 100.0), (0.5, 200.0)])
def test_divergence_renyi_of_laws_far_apart(order, apart):
    student = torch.tensor([[0.0, -apart, -3.0]])
    teacher = torch.tensor([[-apart, 0.0, -apart]])
    ours, theirs = leaf(student), leaf(student, F64)
    loss = opk.divergence(ours, teacher, divergence=D.renyi(order))
    truth = reference.divergence(theirs, teacher, divergence=D.renyi(order))
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_divergence_row_of_nothing_but_zero_coefficients_has_no_gradient():
    logits = torch.tensor([[NAN, 0.0, 1.0]], requires_grad=True)
    nothing = torch.zeros(1)
    loss = opk.divergence(
        logits, torch.zeros(1, 3), divergence=[(nothing, "reverse_kl"), (nothing, "forward_kl")]
    )
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_divergence_cross_entropy_reads_neither_teacher_nor_target():
    student = torch.tensor([[0.0, 0.5, 1.0]])
    expected = torch.softmax(student, -1) - torch.tensor([[0.0, 1.0, 0.0]])
    for teacher in ([[0.0, NAN, 1.0]], [[-INF, -INF, -INF]]):
        logits = leaf(student)
        opk.divergence(
            logits,
            torch.tensor(teacher),
            divergence="cross_entropy",
            labels=torch.tensor([1]),
            target=targets.geometric(0.5, 0.5, detach=False),
        ).backward()
        torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize(
    "target",
    [
        targets.geometric(teacher=1.25, reference=-0.25),
        targets.geometric(teacher=-0.25, reference=1.25),
        targets.geometric(student=-0.5, teacher=1.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [0, 1, 2])
def test_divergence_target_of_any_sign_leaves_out_what_any_of_its_laws_does(side, target):
    logits = [x[:2, :9].clone() for x in (LAWS["student"], LAWS["teacher"], LAWS["reference"])]
    logits[side][:, 4] = -INF
    keywords = {"divergence": "forward_kl", "target": target}
    if target.reference:
        keywords["reference_logits"] = logits[2]
    ours = opk.divergence(*logits[:2], **keywords)
    truth = reference.divergence(*logits[:2], **keywords)
    torch.testing.assert_close(ours, truth)
    weighed = (target.student, target.teacher, target.reference)[side] != 0
    assert bool(ours.isfinite().all()) or (side == 0 and not weighed)


def test_divergence_adaptive_kl_leaves_out_a_side_of_weight_zero():
    # the head agrees, so forward KL has weight 0; it is infinite where q = 0 < p
    student = torch.tensor([[0.5, 0.5, 0.0]], dtype=F64).log()
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=F64).log()
    ours = opk.divergence(student, teacher, divergence="adaptive_kl")
    reverse = opk.divergence(student, teacher, divergence="reverse_kl")
    torch.testing.assert_close(ours, reverse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": targets.mixture(ROWS)}, r"teacher_weight of the mixture must be in \[0, 1\]"),
        ({"temperature": -ROWS}, "student temperature must be positive and finite"),
        ({"temperature": (1.0, ROWS * 0)}, "teacher temperature must be positive and finite"),
        ({"temperature": ROWS * INF}, "student temperature must be positive and finite"),
        ({"reference_softcap": 3.0}, "must come with a reference model"),
    ],
)
def test_divergence_values_out_of_range_are_found_on_cpu(changes, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        _call(**changes)


def test_divergence_values_of_rows_that_do_not_count_may_be_anything():
    weights, temperature = torch.ones(NUM_TOKENS, dtype=F64), ROWS.clone()
    weights[2], temperature[2] = 0.0, NAN
    loss = _call(token_weights=weights, temperature=temperature)
    assert loss[2] == 0.0
    assert bool(loss.isfinite().all())


def test_fused_linear_divergence_reads_no_id_of_a_token_that_does_not_count():
    hidden, head = torch.randn(3, 4), torch.randn(9, 4)
    out = opk.fused_linear_divergence(
        hidden,
        head,
        hidden,
        head.flip(0),
        token_weights=torch.tensor([1.0, 0.0, 1.0]),
        token_ids=torch.tensor([3, -100, 8]),
        statistics=["student_logprobs"],
    )
    assert out.statistics["student_logprobs"][1] == 0.0


def test_forward_mode_is_refused_and_not_zero():
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    head = torch.randn(20, 20)
    calls = (
        lambda x: opk.divergence(x, teacher),
        lambda x: opk.fused_linear_divergence(x, head, teacher, head).loss,
        lambda x: opk.token_logprobs(x, torch.zeros(3, dtype=torch.long)).logprobs,
        lambda x: opk.fused_linear_token_logprobs(x, head, torch.zeros(3).long()).logprobs,
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            torch.func.jvp(call, (student,), (torch.ones_like(student),))
    exact = torch.func.jvp(
        lambda x: opk.divergence(x, teacher, backend="reference"),
        (student,),
        (torch.ones_like(student),),
    )
    assert bool(exact[1].isfinite().all())


def test_divergence_refuses_complex_weights():
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    with pytest.raises(TypeError, match="token_weights must hold real numbers"):
        opk.divergence(student, teacher, token_weights=torch.ones(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="temperature must hold real numbers"):
        opk.divergence(student, teacher, temperature=torch.ones(3, dtype=torch.complex64))
