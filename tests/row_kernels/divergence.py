# SPDX-License-Identifier: Apache-2.0
"""The divergence kernels of a GPU backend, through the public op and the raw ops."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import divergences as D
from opd_kernels import reference, targets
from opd_kernels.reference.divergence import statistics as reference_statistics
from tests.cases import (
    BF16,
    CASES,
    F16,
    F32,
    F64,
    INF,
    INTERPRETED,
    NAN,
    SPECS,
    Case,
    FusedCase,
    fused_of,
    logits_of,
    spec,
)
from tests.checks import (
    check_divergence,
    check_fused_divergence,
    dtype_id,
    laws_of,
    leaf,
    workspace_for,
)
from tests.options import option_cases
from tests.tolerance import assert_relative

ROWS = 2


# every divergence where the row or its layout is special, two of them elsewhere
SPECIAL = {
    "two_words",
    "padded_both_odd",
    "some_rows_masked",
    "minus_inf_student",
    "minus_inf_teacher",
    "minus_inf_both",
    "equal_laws",
    "unrelated_12.0",
    "scale_30.0_gap_1.0",
}


FEW = (spec("forward_kl"), spec("jsd", beta=0.1))


def _parameters():
    for case in CASES:
        if case.name not in INTERPRETED:
            continue
        for dtype in (dtype for dtype in case.dtypes if dtype != F64):
            for divergence in SPECS if dtype == F32 and case.name in SPECIAL else FEW:
                yield pytest.param(
                    case, dtype, divergence, id=f"{case.name}-{dtype_id(dtype)}-{divergence}"
                )


@pytest.mark.parametrize(("case", "dtype", "divergence"), list(_parameters()))
def test_divergence_matches_reference(gpu, case, dtype, divergence):
    rows = 1 if case.vocab_size > 10000 else ROWS
    check_divergence(case, dtype, divergence, backend=gpu.name, max_tokens=rows)


OPTION_CASE = Case("options", 3, 300, weights="random", teacher_padding=3)


@pytest.mark.parametrize(("option", "divergence", "dtype"), option_cases(F32))
def test_divergence_options_match_reference(gpu, option, divergence, dtype):
    check_divergence(OPTION_CASE, dtype, divergence, backend=gpu.name, option=option)


@pytest.mark.parametrize(("gap", "shift"), [(1e-2, 0.0), (1e-4, 0.0), (1e-3, 300.0)])
@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_divergence_is_precise_when_the_laws_are_close(gpu, gap, shift, divergence):
    student, teacher = torch.randn(2, 1, 3000)
    student = leaf(teacher + gap * student + shift)
    exact = leaf(student.detach(), F64)
    loss = opk.divergence(student, teacher, divergence=divergence.public(), backend=gpu.name)
    truth = reference.divergence(exact, teacher, divergence=divergence)
    loss.sum().backward()
    truth.sum().backward()
    assert_relative(loss, truth, 1e-5 + 1e-14 / truth.item(), f"{divergence} at gap {gap}")
    error = (student.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-6, f"relative Frobenius error {error:.2e}"


# -- statistics ------------------------------------------------------------------------------------

STATISTICS = (
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "student_lse",
    "teacher_lse",
    "student_logprobs",
    "teacher_logprobs",
    "student_topk_mass",
    "teacher_topk_mass",
)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("target", [None, targets.geometric(0.4, 0.5), targets.mixture(0.3)])
def test_statistics_match_reference(gpu, dtype, target):
    case = Case("statistics", 3, 900, temperature=(1.5, 0.8), weights="some_zero")
    logits = logits_of(case, dtype)
    more = {
        "target": target,
        "token_ids": torch.tensor([0, 3, 899]),
        "topk_ids": torch.tensor([[0, 1, 5], [2, -1, 3], [899, -1, 7]]),
    }
    truth = reference_statistics(logits.student, logits.teacher, **logits.keywords(), **more)
    laws = laws_of(
        logits.student,
        case.vocab_size,
        temperature=logits.temperature,
        token_weights=logits.token_weights,
        **more,
    )
    *_, statistics = gpu.ops.divergence_fwd(logits.student, logits.teacher, None, *laws, True)
    for name, row in zip(STATISTICS, statistics, strict=True):
        torch.testing.assert_close(row.double(), truth[name], rtol=2e-6, atol=2e-6, msg=name)


def test_top1_agreement_takes_the_first_of_equal_logits(gpu):
    student, teacher = torch.zeros(2, 2500), torch.zeros(2, 2500)
    student[0, [3, 2400]] = 5.0
    teacher[0, [3, 700]] = 5.0
    student[1, [3, 2400]] = 5.0
    teacher[1, [4, 2400]] = 5.0
    laws = laws_of(student, 2500)
    *_, statistics = gpu.ops.divergence_fwd(student, teacher, None, *laws, True)
    assert statistics[4].tolist() == [1.0, 0.0]


def test_ids_beyond_the_vocabulary_are_nan(gpu):
    # a GPU kernel can't raise without a sync, and must not read beyond the row
    student, teacher = torch.randn(2, 3, 20)
    labels, ids = torch.tensor([[3], [20], [-1]]), torch.tensor([19, 20, -1])
    laws = laws_of(
        student,
        18,
        divergence="cross_entropy",
        labels=labels,
        token_ids=ids,
        topk_ids=torch.tensor([[0, -1], [3, 18], [1, 4]]),
    )
    loss, _, statistics = gpu.ops.divergence_fwd(student, teacher, None, *laws, True)
    assert loss.isnan().tolist() == [False, True, False]
    assert loss[2] == 0
    assert statistics[7].isnan().tolist() == [True, True, True]
    assert statistics[9].isnan().tolist() == [False, True, False]


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_nan_stays_in_its_row(gpu, divergence):
    student, teacher = torch.randn(2, 3, 100)
    student[1, 5], teacher[2, 99] = NAN, NAN
    logits = leaf(student)
    loss = opk.divergence(logits, teacher, divergence=divergence.public(), backend=gpu.name)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True]
    assert logits.grad.isnan().any(dim=1).tolist() == [False, True, True]


def test_coefficient_zero_leaves_out_infinity(gpu):
    student = leaf(torch.zeros(2, 3))
    teacher = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, 1.0]])
    total = [(torch.tensor([0.0, 1.0]), "reverse_kl"), (1.0, "forward_kl")]
    loss = opk.divergence(student, teacher, divergence=total, backend=gpu.name)
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(student.grad.isfinite().all())
    alone = opk.divergence(student, teacher, divergence="forward_kl", backend=gpu.name)
    torch.testing.assert_close(loss[0], alone[0], rtol=1e-6, atol=0)


def test_adaptive_kl_keeps_tied_tokens_together(gpu):
    # masses .4 .2 .2 .2: at a head mass of .5 no one of the three fits without the others
    teacher = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    student = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for mass in (0.3, 0.41, 0.5, 0.99):
        divergence = D.adaptive_kl(mass)
        ours = opk.divergence(student, teacher, divergence=divergence, backend=gpu.name)
        truth = reference.divergence(student, teacher, divergence=divergence)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)


def test_softcap_of_huge_logits_has_no_slope(gpu):
    student = leaf(torch.tensor([[1e4, -1e4, 0.0]]))
    loss = opk.divergence(
        student, torch.zeros(1, 3), divergence="forward_kl", student_softcap=30.0, backend=gpu.name
    )
    loss.sum().backward()
    assert bool(student.grad.isfinite().all())
    assert student.grad[0, :2].tolist() == [0.0, 0.0]


def test_divergence_compiles_without_a_graph_break(gpu):
    student, teacher = torch.randn(2, 2, 40)

    def loss(logits):
        return opk.divergence(logits * 1.5, teacher, divergence="jsd", backend=gpu.name).sum()

    torch._dynamo.reset()
    expected, actual = leaf(student), leaf(student)
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    assert torch.equal(actual.grad, expected.grad)


# -- the fused op ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=dtype_id)
@pytest.mark.parametrize("divergence", [spec("jsd", beta=0.3), spec("reverse_kl")], ids=str)
def test_fused_linear_divergence_matches_reference(gpu, divergence, dtype, reduction):
    case = FusedCase("row_kernels", 5, 301, 16, 24, weights="some_zero", teacher_padding=3)
    check_fused_divergence(case, dtype, divergence, gpu.name, reduction, workspace_for(case, 2))


def test_fused_linear_divergence_statistics_match_reference(gpu):
    inputs = fused_of(FusedCase("row_kernels", 4, 301, 16, 24), F32)
    names = ("student_entropy", "top1_agreement")
    out = opk.fused_linear_divergence(*inputs.tensors(), statistics=names, backend=gpu.name)
    truth = reference.fused_linear_divergence(*inputs.tensors(), statistics=names)
    for name in names:
        torch.testing.assert_close(
            out.statistics[name].double(), truth.statistics[name], rtol=2e-6, atol=2e-6
        )
