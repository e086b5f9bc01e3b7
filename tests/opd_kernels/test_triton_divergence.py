# SPDX-License-Identifier: Apache-2.0
"""The Triton divergence kernels under the interpreter, through the public op and the raw ops."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from opd_kernels.reference.divergence import statistics as reference_statistics
from tests.cases import (
    BF16,
    CASES,
    F16,
    F32,
    F64,
    INTERPRETED,
    NAN,
    SPECS,
    Case,
    FusedCase,
    fused_of,
    logits_of,
    spec,
)
from tests.checks import check_divergence, check_fused_divergence, dtype_id, leaf, workspace_for
from tests.tolerance import assert_relative

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

ROWS = 3
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
def test_triton_divergence_matches_reference(case, dtype, divergence):
    rows = 1 if case.vocab_size > 10000 else ROWS
    check_divergence(case, dtype, divergence, backend="triton", max_tokens=rows)


@pytest.mark.parametrize(("gap", "shift"), [(1e-2, 0.0), (1e-4, 0.0), (1e-3, 300.0)])
@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_triton_divergence_is_precise_when_the_laws_are_close(gap, shift, divergence):
    student, teacher = torch.randn(2, 1, 3000)
    student = leaf(teacher + gap * student + shift)
    exact = leaf(student.detach(), F64)
    loss = opk.divergence(student, teacher, divergence=divergence.public(), backend="triton")
    truth = reference.divergence(exact, teacher, divergence=divergence)
    loss.sum().backward()
    truth.sum().backward()
    assert_relative(loss, truth, 1e-5 + 1e-14 / truth.item(), f"{divergence} at gap {gap}")
    error = (student.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-6, f"relative Frobenius error {error:.2e}"


@pytest.mark.parametrize("divergence", SPECS, ids=str)
@pytest.mark.parametrize("with_statistics", [True, False])
def test_triton_fwd_grad_is_forward_and_backward_in_place(divergence, with_statistics):
    # two blocks, the second of them partly filled
    case = Case("in_place", 2, 2500, temperature=(0.7, 1.3), weights="some_zero", row_gap=5)
    logits = logits_of(case, F32)
    public = divergence.public()
    numbers = (public.id, *public.kernel_params, *logits.temperatures(), case.vocab_size)
    inputs = logits.student, logits.teacher, logits.token_weights
    ops = torch.ops.opd_triton
    expected = ops.divergence_fwd(*inputs, *numbers, with_statistics)
    gradient = ops.divergence_bwd(torch.ones(2), *inputs, *expected[1:4], *numbers)
    student, teacher = logits.student.clone(), logits.teacher.clone()
    loss, statistics = ops.divergence_fwd_grad_(
        student, teacher, logits.token_weights, *numbers, with_statistics
    )
    assert torch.equal(loss, expected[0])
    assert torch.equal(statistics, expected[4])
    torch.testing.assert_close(student, gradient, rtol=1e-6, atol=1e-9)
    assert bool((student[logits.token_weights == 0] == 0).all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
def test_triton_statistics_match_reference(dtype):
    case = Case("statistics", 3, 900, temperature=(1.5, 0.8), weights="some_zero")
    logits = logits_of(case, dtype)
    truth = reference_statistics(logits.student, logits.teacher, **logits.keywords())
    *_, statistics = torch.ops.opd_triton.divergence_fwd(
        logits.student, logits.teacher, logits.token_weights,
        0, 0.0, 0.0, *logits.temperatures(), case.vocab_size, True,
    )  # fmt: skip
    names = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl", "top1_agreement")
    for name, row in zip(names, statistics, strict=True):
        torch.testing.assert_close(row.double(), truth[name], rtol=2e-6, atol=2e-6, msg=name)


def test_triton_top1_agreement_takes_the_first_of_equal_logits():
    student, teacher = torch.zeros(2, 2500), torch.zeros(2, 2500)
    student[0, [3, 2400]] = 5.0
    teacher[0, [3, 700]] = 5.0
    student[1, [3, 2400]] = 5.0
    teacher[1, [4, 2400]] = 5.0
    *_, statistics = torch.ops.opd_triton.divergence_fwd(
        student, teacher, None, 0, 0.0, 0.0, 1.0, 1.0, 2500, True
    )
    assert statistics[4].tolist() == [1.0, 0.0]


def test_triton_agrees_with_the_cpu_kernel():
    case = Case("agree", 2, 1500, temperature=(0.9, 1.1))
    logits = logits_of(case, F32)
    numbers = (2, 0.3, 0.0, *logits.temperatures(), case.vocab_size)
    inputs = logits.student, logits.teacher, None
    cpu = torch.ops.opd.divergence_fwd(*inputs, *numbers, True)
    gpu = torch.ops.opd_triton.divergence_fwd(*inputs, *numbers, True)
    for one, two in zip(gpu, cpu, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)


def test_triton_nan_stays_in_its_row():
    student, teacher = torch.randn(2, 3, 100)
    student[1, 5], teacher[2, 99] = NAN, NAN
    logits = leaf(student)
    loss = opk.divergence(logits, teacher, divergence="jsd", backend="triton")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True]
    assert logits.grad.isnan().any(dim=1).tolist() == [False, True, True]


def test_triton_divergence_is_deterministic_between_runs():
    student, teacher = torch.randn(2, 3, 700)
    losses = [opk.divergence(student, teacher, backend="triton") for _ in range(2)]
    assert torch.equal(*losses)


def test_triton_rejects_float64():
    logits = torch.randn(2, 5, dtype=F64)
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the Triton"):
        opk.divergence(logits, logits, backend="triton")


def test_triton_divergence_compiles_without_a_graph_break():
    student, teacher = torch.randn(2, 2, 40)

    def loss(logits):
        return opk.divergence(logits * 1.5, teacher, divergence="jsd", backend="triton").sum()

    torch._dynamo.reset()
    expected, actual = leaf(student), leaf(student)
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    assert torch.equal(actual.grad, expected.grad)


def test_triton_divergence_opcheck():
    student, teacher = torch.randn(2, 2, 20)
    weights = torch.tensor([1.0, 0.0])
    numbers = (2, 0.3, 0.0, 1.0, 2.0, 18)
    ops = torch.ops.opd_triton
    torch.library.opcheck(ops.divergence_fwd, (leaf(student), teacher, weights, *numbers, True))
    loss, *saved, _ = ops.divergence_fwd(student, teacher, weights, *numbers, False)
    torch.library.opcheck(
        ops.divergence_bwd, (torch.ones_like(loss), student, teacher, weights, *saved, *numbers)
    )
    torch.library.opcheck(ops.divergence_fwd_grad_, (student, teacher, weights, *numbers, True))


def test_triton_fused_linear_divergence_opcheck():
    inputs = fused_of(FusedCase("triton", 3, 40, 8, 8), F32)
    trained = [leaf(x) for x in inputs.tensors()[:2]]
    tensors = [*trained, *inputs.tensors()[2:], None]
    numbers = (2, 0.3, 0.0, 1.0, 1.0, 40, 1 << 20)
    ops = torch.ops.opd
    torch.library.opcheck(
        ops.fused_linear_divergence_sum, (*tensors, *numbers, True, True, True, "triton")
    )
    torch.library.opcheck(ops.fused_linear_divergence_fwd, (*tensors, *numbers, True, "triton"))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=dtype_id)
def test_triton_fused_linear_divergence_matches_reference(dtype, reduction):
    case = FusedCase("triton", 5, 301, 16, 24, weights="some_zero", teacher_padding=3)
    check_fused_divergence(
        case, dtype, spec("jsd", beta=0.3), "triton", reduction, workspace_for(case, 2)
    )


def test_triton_fused_linear_divergence_statistics_match_reference():
    inputs = fused_of(FusedCase("triton", 4, 301, 16, 24), F32)
    names = ("student_entropy", "top1_agreement")
    out = opk.fused_linear_divergence(*inputs.tensors(), statistics=names, backend="triton")
    truth = reference.fused_linear_divergence(*inputs.tensors(), statistics=names)
    for name in names:
        torch.testing.assert_close(
            out.statistics[name].double(), truth.statistics[name], rtol=2e-6, atol=2e-6
        )
