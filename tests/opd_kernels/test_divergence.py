# SPDX-License-Identifier: Apache-2.0
"""opk.divergence on the CPU kernel: truth, precision, edges, autograd, compile, errors."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import divergences as D
from opd_kernels import reference, targets
from opd_kernels.divergence import CLOSE_LSE, FINISH, LSE, OPEN, ROW_SUMS, TERMS
from tests import eager
from tests.cases import BF16, CASES, F16, F32, F64, INF, NAN, SPECS, Case, logits_of
from tests.checks import check_divergence, dtype_id, laws_of, leaf
from tests.golden import GOLDEN, PAIRS
from tests.tolerance import assert_relative

# of rows this long, by what a row keeps: a sum, two laws, a mass in float64, a threshold. Length
# and divergence meet nowhere else in the code. Each divergence has one such row, and with the slow
# tests all of them
LONG, EACH_HAS = 100_000, ("vocab_151936", F32)
OF_LONG_ROWS = {"forward_kl", "jsd-beta=0.1", "renyi-alpha=0.7", "adaptive_kl-head_mass=0.8"}


def _is_slow(case, dtype, divergence) -> bool:
    is_spared = case.vocab_size < LONG or (case.name, dtype) == EACH_HAS
    return case.slow or not (is_spared or str(divergence) in OF_LONG_ROWS)


EVERY = [
    pytest.param(
        case,
        dtype,
        divergence,
        id=f"{case.name}-{dtype_id(dtype)}-{divergence}",
        marks=[pytest.mark.slow] * _is_slow(case, dtype, divergence),
    )
    for case in CASES
    for dtype in case.dtypes
    for divergence in SPECS
]
# parts of these are constants of the gradient by definition
DETACHED = ("todi", "adaptive_kl", "concrete_score")
every_divergence = pytest.mark.parametrize("divergence", SPECS, ids=str)


def gaussian(num_tokens: int, vocab_size: int, dtype=F32, std: float = 2.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, vocab_size, generator=generator, dtype=F64) * std
    teacher = torch.randn(num_tokens, vocab_size, generator=generator, dtype=F64) * std
    return student.to(dtype), teacher.to(dtype)


# -- truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype", "divergence"), EVERY)
def test_divergence_matches_reference(case, dtype, divergence):
    check_divergence(case, dtype, divergence, backend="cpu")


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("golden", list(GOLDEN), ids=str)
def test_divergence_has_the_golden_values_float64(golden, pair):
    teacher, student = PAIRS[pair]
    value, gradient = GOLDEN[golden][pair]
    logits = torch.tensor([student], dtype=F64).log().requires_grad_()
    loss = opk.divergence(
        logits, torch.tensor([teacher], dtype=F64).log(), divergence=golden.public()
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-8)
    assert logits.grad[0].tolist() == pytest.approx(gradient, abs=1e-8)


@every_divergence
def test_divergence_gradcheck_float64(divergence):
    student, teacher = gaussian(3, 7, F64)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=F64)

    def loss(logits):
        return opk.divergence(
            logits,
            teacher,
            divergence=divergence.public(),
            temperature=(1.3, 0.7),
            token_weights=weights,
        )

    if divergence.name in DETACHED or dict(divergence.params).get("detach_mixture"):
        # its gradient is not the derivative of its value, by definition: compare with autograd's
        ours, theirs = leaf(student), leaf(student)
        loss(ours).sum().backward()
        reference.divergence(
            theirs,
            teacher,
            divergence=divergence,
            temperature=(1.3, 0.7),
            token_weights=weights,
        ).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
        return
    assert torch.autograd.gradcheck(loss, (leaf(student),), eps=1e-6, atol=1e-7, rtol=1e-6)


@every_divergence
@pytest.mark.parametrize("student_dtype", [F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("teacher_dtype", [F32, BF16, F16], ids=dtype_id)
def test_divergence_mixes_dtypes(student_dtype, teacher_dtype, divergence):
    student, teacher = gaussian(4, 50)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    mixed = opk.divergence(student, teacher, divergence=divergence.public())
    wide = opk.divergence(student.float(), teacher.float(), divergence=divergence.public())
    assert torch.equal(mixed, wide)


# -- precision -----------------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("shift", [0.0, 300.0])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4])
def test_divergence_is_precise_when_the_laws_are_close(gap, shift, divergence):
    # KL falls to about 5e-9 here; the textbook sum in float32 has lost every digit by then. At a
    # shift of 300 the difference of two logits rounds to 1.5e-5, and the kernel puts that back
    student, teacher = gaussian(4, 32000)
    student = teacher + gap * student / 2 + shift
    loss = opk.divergence(student, teacher, divergence=divergence.public())
    truth = reference.divergence(student, teacher, divergence=divergence)
    # float64 itself keeps sum p log(p / q) to about 1e-15 absolute
    assert_relative(loss, truth, 1e-5 + 1e-14 / truth.min().item(), f"{divergence} at gap {gap}")


@every_divergence
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_divergence_gradient_is_precise_when_the_laws_are_close(shift, divergence):
    student, teacher = gaussian(4, 4000)
    student = leaf(teacher + 1e-3 * student + shift)
    exact = leaf(student.detach(), F64)
    opk.divergence(student, teacher, divergence=divergence.public()).sum().backward()
    reference.divergence(exact, teacher, divergence=divergence).sum().backward()
    error = (student.grad.double() - exact.grad).norm() / exact.grad.norm()
    # q - p of rounded p and q would leave 5e-4
    assert error < 1e-6, f"relative Frobenius error {error:.2e}"


@every_divergence
@pytest.mark.parametrize("std", [2.0, 6.0, 12.0, 30.0])
@pytest.mark.parametrize("gap", [0.1, 1.0])
def test_divergence_gradient_is_as_precise_as_eager(std, gap, divergence):
    logits = logits_of(Case("precision", 8, 4000, std=std, gap=gap), F32)
    exact, theirs, ours = leaf(logits.student, F64), leaf(logits.student), leaf(logits.student)
    reference.divergence(exact, logits.teacher, divergence=divergence).sum().backward()
    eager.divergence(theirs, logits.teacher, divergence=divergence).sum().backward()
    opk.divergence(ours, logits.teacher, divergence=divergence.public()).sum().backward()
    finite = exact.grad.isfinite().all(1)

    def error(gradient):
        return (gradient.double() - exact.grad)[finite].norm() / exact.grad[finite].norm()

    # or to the last bits, where there is nothing left to be better at
    assert error(ours.grad) <= max(error(theirs.grad), 4 * torch.finfo(F32).eps)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys"])
def test_divergence_small_kl_over_a_large_vocabulary(divergence):
    student, teacher = gaussian(4, 151936)
    student = teacher + 1e-2 * student / 2
    truth = reference.divergence(student, teacher, divergence=divergence)
    assert 3e-5 < truth.min() < truth.max() < 7e-5
    assert_relative(opk.divergence(student, teacher, divergence=divergence), truth, 1e-4, "KL")


def test_divergence_minus_infinity_has_exactly_no_mass():
    # the teacher is one-hot, the student uniform: KL(P || Q) = log V, TV = 1 - 1/V
    vocab_size = 151936
    student = torch.zeros(1, vocab_size)
    teacher = torch.full((1, vocab_size), -INF)
    teacher[0, 77] = 3.0
    forward = opk.divergence(student, teacher, divergence="forward_kl")
    variation = opk.divergence(student, teacher, divergence="total_variation")
    assert forward.item() == pytest.approx(math.log(vocab_size), rel=4 * torch.finfo(F32).eps)
    assert variation.item() == pytest.approx(1 - 1 / vocab_size, rel=4 * torch.finfo(F32).eps)
    assert opk.divergence(student, teacher, divergence="reverse_kl").item() == INF


def test_divergence_row_sums_keep_their_digits_over_a_large_vocabulary():
    # two uniform laws on 151,936 tokens, one of them with half the mass moved to the first half:
    # every term is the same number, the worst case of a serial float32 sum
    vocab_size = 151936
    student = torch.zeros(1, vocab_size)
    teacher = torch.zeros(1, vocab_size)
    teacher[0, : vocab_size // 2] = math.log(3.0)
    exact = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = opk.divergence(student, teacher, divergence="forward_kl")
    assert loss.item() == pytest.approx(exact, rel=1e-6)


def test_divergence_underflowing_probabilities_count_as_zero():
    # e^-200 is 0 in float32 but not in the formula: q log(q / p) must come out 0, not NaN
    student = torch.tensor([[0.0, -200.0, -1e4]])
    teacher = torch.tensor([[0.0, -1e4, -200.0]])
    for divergence in SPECS:
        logits = leaf(student)
        loss = opk.divergence(logits, teacher, divergence=divergence.public())
        loss.sum().backward()
        truth = reference.divergence(student, teacher, divergence=divergence).item()
        if math.isfinite(truth):
            assert loss.item() == pytest.approx(0.0, abs=1e-30), str(divergence)
            assert logits.grad.abs().max() < 1e-30, str(divergence)
        else:
            # p^2 / q and the like grow without bound as q underflows
            assert loss.item() == truth == INF, str(divergence)


# -- edges ---------------------------------------------------------------------------------------


@every_divergence
def test_divergence_of_equal_logits_is_zero_with_zero_gradient(divergence):
    student = gaussian(3, 1000)[0]
    logits = leaf(student)
    loss = opk.divergence(logits, student, divergence=divergence.public(), temperature=0.7)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0, 0.0]
    assert logits.grad.abs().max() <= 1e-9


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_divergence_of_no_tokens_is_empty(dtype):
    logits = torch.empty(0, 17, dtype=dtype, requires_grad=True)
    loss = opk.divergence(logits, torch.empty(0, 17, dtype=dtype))
    loss.sum().backward()
    assert loss.shape == (0,)
    assert logits.grad.shape == (0, 17)


def test_divergence_nan_stays_in_its_row():
    student, teacher = gaussian(4, 100)
    student[1, 5], teacher[2, 9] = NAN, NAN
    clean = opk.divergence(student[[0, 3]], teacher[[0, 3]])
    for divergence in SPECS:
        loss = opk.divergence(student, teacher, divergence=divergence.public())
        assert loss.isnan().tolist() == [False, True, True, False], str(divergence)
    assert torch.equal(opk.divergence(student, teacher)[[0, 3]], clean)


def test_divergence_plus_infinity_is_nan_not_a_number():
    student, teacher = gaussian(2, 100)
    student[0, 3] = INF
    loss = opk.divergence(student, teacher, divergence="jsd")
    assert loss.isnan().tolist() == [True, False]


def test_divergence_row_without_a_finite_logit_is_nan():
    student, teacher = gaussian(2, 100)
    teacher[0] = -INF
    loss = opk.divergence(student, teacher, divergence="jsd")
    assert loss.isnan().tolist() == [True, False]


@every_divergence
def test_divergence_weight_zero_hides_whatever_the_row_holds(divergence):
    student, teacher = gaussian(4, 100)
    weights = torch.tensor([1.0, 0.0, 0.0, 0.5])
    expected = opk.divergence(
        student, teacher, divergence=divergence.public(), token_weights=weights
    )
    student[1], teacher[2, 3], student[2, 4] = NAN, INF, -INF
    logits = leaf(student)
    loss = opk.divergence(logits, teacher, divergence=divergence.public(), token_weights=weights)
    loss.sum().backward()
    assert torch.equal(loss, expected)
    assert loss[1:3].tolist() == [0.0, 0.0]
    assert bool((logits.grad[1:3] == 0).all())
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.triton)])
def test_divergence_weight_zero_wins_over_an_infinite_upstream_gradient(backend, request):
    if backend == "triton":
        request.getfixturevalue("interpreted_triton")
    student, teacher = gaussian(2, 30)
    logits = leaf(student)
    weights = torch.tensor([0.0, 1.0])
    loss = opk.divergence(logits, teacher, token_weights=weights, backend=backend)
    loss.backward(torch.tensor([INF, 1.0]))
    assert bool((logits.grad[0] == 0).all())
    assert bool(logits.grad[1].isfinite().all())


def test_divergence_huge_logits_do_not_overflow():
    student, teacher = gaussian(3, 500, std=30.0)
    shifted = opk.divergence(student + 3e4, teacher - 3e4, divergence="jsd")
    # adding 3e4 rounds the logits to 2e-3, in the input itself
    torch.testing.assert_close(
        shifted, opk.divergence(student, teacher, divergence="jsd"), rtol=0, atol=5e-3
    )
    top = torch.finfo(F32).max
    loss = opk.divergence(
        torch.tensor([[top, -top]]), torch.tensor([[-top, top]]), divergence="jsd"
    )
    assert loss.item() == pytest.approx(math.log(2.0), rel=1e-6)


# -- autograd ------------------------------------------------------------------------------------


def test_divergence_gives_the_teacher_no_gradient():
    student, teacher = (leaf(x) for x in gaussian(3, 20))
    opk.divergence(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_divergence_without_grad_is_a_plain_tensor():
    student, teacher = gaussian(3, 20)
    assert not opk.divergence(student, teacher).requires_grad
    with torch.no_grad():
        assert not opk.divergence(leaf(student), teacher).requires_grad


def test_divergence_in_inference_mode():
    student, teacher = gaussian(3, 20)
    with torch.inference_mode():
        loss = opk.divergence(leaf(student), teacher)
    assert torch.equal(loss, opk.divergence(student, teacher))


def test_divergence_has_no_second_derivative_and_says_so():
    student, teacher = gaussian(3, 20, F64)
    logits = leaf(student)
    (gradient,) = torch.autograd.grad(
        opk.divergence(logits, teacher).sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(gradient.square().sum(), logits)


def test_divergence_backward_twice_gives_the_same_gradient():
    student, teacher = gaussian(3, 20)
    logits = leaf(student)
    loss = opk.divergence(logits, teacher).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_divergence_gradient_is_linear_in_the_upstream_gradient():
    student, teacher = gaussian(3, 20, F64)
    logits = leaf(student)
    loss = opk.divergence(logits, teacher, divergence="jsd")
    one = torch.autograd.grad(loss, logits, torch.ones(3, dtype=F64), retain_graph=True)[0]
    factors = torch.tensor([-3.0, 0.0, 0.25], dtype=F64)
    (scaled,) = torch.autograd.grad(loss, logits, factors)
    torch.testing.assert_close(scaled, one * factors[:, None], rtol=1e-14, atol=1e-16)


def test_divergence_backpropagates_through_what_made_the_logits():
    hidden = torch.randn(5, 8, requires_grad=True)
    head = torch.randn(30, 8)
    teacher = torch.randn(5, 30)
    opk.divergence(hidden @ head.T, teacher, divergence="forward_kl").mean().backward()
    exact = leaf(hidden.detach(), F64)
    reference.divergence(
        exact @ head.double().T, teacher, divergence="forward_kl"
    ).mean().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_divergence_accepts_rows_that_are_not_contiguous():
    student, teacher = gaussian(6, 40)
    expected = opk.divergence(student, teacher)
    by_column = student.t().contiguous().t()
    assert by_column.stride() == (1, 6)
    logits = leaf(by_column)
    loss = opk.divergence(logits, teacher.t().contiguous().t())
    assert torch.equal(loss, expected)
    loss.sum().backward()
    contiguous = leaf(student)
    opk.divergence(contiguous, teacher).sum().backward()
    assert torch.equal(logits.grad, contiguous.grad)
    every_other = torch.stack([student, torch.full_like(student, NAN)], dim=1).flatten(0, 1)[::2]
    assert torch.equal(opk.divergence(every_other, teacher), expected)
    broadcast = teacher[:1].expand(6, 40)
    assert torch.equal(
        opk.divergence(student, broadcast), opk.divergence(student, broadcast.contiguous())
    )


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.triton)])
def test_divergence_finds_rows_beyond_two_to_the_31_elements(backend, request, tmp_path):
    # T x V passes 2^31 at 14,135 tokens of 151,936; here two rows of a sparse file lie so far apart
    if backend == "triton":
        request.getfixturevalue("interpreted_triton")
    stride, vocab_size = 1 << 31, 40
    storage = torch.from_file(
        str(tmp_path / "logits"), shared=True, size=stride + vocab_size, dtype=BF16
    )
    far = storage.as_strided((2, vocab_size), (stride, 1))
    student, teacher = gaussian(2, vocab_size, BF16)
    far.copy_(student)
    loss = opk.divergence(far, teacher, backend=backend)
    assert torch.equal(loss, opk.divergence(student, teacher, backend=backend))


def test_divergence_leaves_its_inputs_alone():
    student, teacher = gaussian(3, 700, BF16)
    before = student.clone(), teacher.clone()
    logits = student.requires_grad_()
    opk.divergence(logits, teacher, temperature=2.0).sum().backward()
    assert torch.equal(logits.detach(), before[0])
    assert torch.equal(teacher, before[1])


# -- determinism ---------------------------------------------------------------------------------


@every_divergence
def test_divergence_is_deterministic_across_threads_and_runs(divergence):
    student, teacher = gaussian(37, 3001)
    results = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        logits = leaf(student)
        loss = opk.divergence(logits, teacher, divergence=divergence.public(), temperature=1.1)
        loss.sum().backward()
        results.append((loss.detach(), logits.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_divergence_of_a_row_does_not_depend_on_its_neighbours():
    student, teacher = gaussian(9, 777)
    together = opk.divergence(student, teacher, divergence="jsd")
    alone = torch.cat(
        [opk.divergence(student[i : i + 1], teacher[i : i + 1], divergence="jsd") for i in range(9)]
    )
    assert torch.equal(together, alone)


# -- compile and registration --------------------------------------------------------------------


@every_divergence
def test_divergence_compiles_without_a_graph_break(divergence):
    student, teacher = gaussian(5, 60)
    weights = torch.rand(5)

    def loss(logits, teacher, weights):
        return opk.divergence(
            logits * 1.5, teacher, divergence=divergence.public(), token_weights=weights
        ).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = leaf(student), leaf(student)
    loss(expected, teacher, weights).backward()
    compiled(actual, teacher, weights).backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_divergence_compiles_with_dynamic_tokens(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t: opk.divergence(s * 2, t, divergence="jsd").sum(),
        fullgraph=True,
        dynamic=True,
        backend=compiler,
    )
    for num_tokens in (4, 7):
        student, teacher = gaussian(num_tokens, 33)
        expected, actual = leaf(student), leaf(student)
        opk.divergence(expected * 2, teacher, divergence="jsd").sum().backward()
        compiled(actual, teacher).backward()
        torch.testing.assert_close(actual.grad, expected.grad)


def _arguments(dtype=F32, everything=False):
    """(logits, laws) of a small call: a plain one, or one with every option."""
    student, teacher = gaussian(3, 20, dtype)
    real = torch.promote_types(dtype, F32)
    weights = torch.tensor([1.0, 0.0, 0.5], dtype=real)
    if not everything:
        laws = laws_of(student, 18, divergence=D.jsd(0.3), token_weights=weights)
        return [student, teacher, None], laws
    laws = laws_of(
        student,
        18,
        divergence=[(weights, D.renyi(0.3)), (0.5, "cross_entropy"), (1.0, "concrete_score")],
        temperature=(weights + 1.0, 2.0),
        token_weights=weights,
        target=targets.geometric(0.3, 0.5, 0.2, detach=False),
        has_reference=True,
        softcaps=(5.0, None, 3.0),
        logit_scales=(0.5, 1.0, 2.0),
        labels=torch.tensor([[3, -1], [4, 5], [0, 17]]),
        label_weights=torch.ones(3, 2, dtype=real),
        token_ids=torch.tensor([0, 3, 17]),
        topk_ids=torch.tensor([[0, 1], [-1, 4], [17, 16]]),
    )
    return [student, teacher, gaussian(3, 20, dtype, seed=1)[0]], laws


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
def test_divergence_fwd_opcheck(dtype, everything):
    (student, *logits), laws = _arguments(dtype, everything)
    arguments = (leaf(student), *logits, *laws, everything)
    torch.library.opcheck(torch.ops.opd.divergence_fwd, arguments)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
def test_divergence_bwd_opcheck(dtype, everything):
    logits, laws = _arguments(dtype, everything)
    loss, state, _ = torch.ops.opd.divergence_fwd(*logits, *laws, False)
    arguments = (torch.ones_like(loss), state, *logits, *laws)
    torch.library.opcheck(torch.ops.opd.divergence_bwd, arguments)
    student, *others = logits
    torch.library.opcheck(
        torch.ops.opd.divergence_bwd_,
        (torch.ones_like(loss), state, student, *others, *laws, 0, -1),
    )


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
def test_divergence_fwd_grad_opcheck(dtype, everything):
    logits, laws = _arguments(dtype, everything)
    torch.library.opcheck(torch.ops.opd.divergence_fwd_grad_, (*logits, *laws, everything, -1))


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
def test_divergence_phase_opcheck(dtype, everything):
    logits, laws = _arguments(dtype, everything)
    state = torch.empty(3, laws.state_size, dtype=F64)
    for phase in (OPEN, LSE, CLOSE_LSE, ROW_SUMS, TERMS, FINISH):
        arguments = (state, *logits, *laws, phase, 0, everything)
        torch.library.opcheck(torch.ops.opd.divergence_phase_, arguments)
        torch.ops.opd.divergence_phase_(*arguments)


@every_divergence
@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
def test_divergence_fwd_grad_is_forward_and_backward_in_place(dtype, divergence):
    case = Case("in_place", 5, 700, temperature=(0.7, 1.3), weights="some_zero", row_gap=5)
    logits = logits_of(case, dtype)
    weights = logits.token_weights.to(dtype)
    laws = laws_of(
        logits.student,
        case.vocab_size,
        divergence=divergence.public(),
        temperature=logits.temperature,
        token_weights=weights,
    )
    student, teacher = logits.student.clone(), logits.teacher.clone()
    loss, statistics = torch.ops.opd.divergence_fwd_grad_(student, teacher, None, *laws, True, -1)
    expected, state, expected_statistics = torch.ops.opd.divergence_fwd(
        logits.student, logits.teacher, None, *laws, True
    )
    gradient = torch.ops.opd.divergence_bwd(
        torch.ones_like(loss), state, logits.student, logits.teacher, None, *laws
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(statistics, expected_statistics, rtol=0, atol=0, equal_nan=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        student, gradient, rtol=4 * eps, atol=4 * eps * gradient.abs().max().item()
    )


@every_divergence
@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
def test_divergence_in_slices_is_divergence_of_whole_rows(dtype, divergence):
    if divergence.name == "adaptive_kl":
        pytest.skip("it needs whole rows")
    student, teacher = gaussian(4, 1300, dtype)
    laws = laws_of(
        student, 1300, divergence=divergence.public(), token_ids=torch.tensor([0, 599, 600, 1299])
    )
    loss, state, statistics = torch.ops.opd.divergence_fwd(student, teacher, None, *laws, True)
    gradient = torch.ops.opd.divergence_bwd(
        torch.ones_like(loss), state, student, teacher, None, *laws
    )
    sliced = torch.empty_like(state)
    slices = [slice(0, 600), slice(600, 1111), slice(1111, 1300)]

    def phase(number, columns):
        pair = student[:, columns], teacher[:, columns]
        return torch.ops.opd.divergence_phase_(
            sliced, *pair, None, *laws.columns(columns), number, columns.start, True
        )

    phase(OPEN, slices[0])
    for number in (LSE, ROW_SUMS, TERMS):
        for columns in slices:
            phase(number, columns)
        if number == LSE:
            phase(CLOSE_LSE, slices[0])
    actual, actual_statistics = phase(FINISH, slices[0])
    close = {"rtol": 1e-12 if dtype == F64 else 2e-6, "atol": 1e-13 if dtype == F64 else 1e-6}
    torch.testing.assert_close(actual, loss, **close)
    torch.testing.assert_close(actual_statistics, statistics, equal_nan=True, **close)
    for columns in slices:
        part = student[:, columns].clone()
        torch.ops.opd.divergence_bwd_(
            torch.ones_like(loss),
            sliced,
            part,
            teacher[:, columns],
            None,
            *laws.columns(columns),
            columns.start,
            -1,
        )
        largest = gradient.abs().max().item()
        torch.testing.assert_close(
            part, gradient[:, columns], rtol=close["rtol"], atol=close["atol"] * max(1.0, largest)
        )


# -- errors --------------------------------------------------------------------------------------


def _call(**changes):
    student, teacher = gaussian(4, 20)
    arguments = {"student_logits": student, "teacher_logits": teacher, **changes}
    return opk.divergence(
        arguments.pop("student_logits"), arguments.pop("teacher_logits"), **arguments
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_logits": [[1.0]]}, TypeError, "student_logits must be a tensor, got list"),
        ({"student_logits": torch.zeros(2, 4, 20)}, ValueError, "student_logits must have 2 dim"),
        ({"teacher_logits": torch.zeros(20)}, ValueError, "teacher_logits must have 2 dim"),
        ({"teacher_logits": torch.zeros(5, 20)}, ValueError, "teacher_logits must have 4 rows"),
        ({"teacher_logits": torch.zeros(4, 24)}, ValueError, "pass vocab_size=20"),
        ({"student_logits": torch.zeros(4, 20).long()}, TypeError, "got torch.int64"),
        (
            {"teacher_logits": torch.zeros(4, 20).double()},
            TypeError,
            "float64 must be used for all",
        ),
        ({"vocab_size": 0}, ValueError, r"vocab_size must be in \[1, 20\], got 0"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must be in \[1, 20\], got 21"),
        ({"vocab_size": 20.0}, TypeError, "vocab_size must be an int"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive and finite"),
        ({"temperature": NAN}, ValueError, "temperature must be positive and finite, got nan"),
        ({"temperature": (1.0, INF)}, ValueError, "teacher temperature must be positive"),
        ({"temperature": (1.0, 1.0, 1.0)}, ValueError, r"number or \(student, teacher\)"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
        ({"token_weights": torch.ones(3)}, ValueError, "token_weights must have 4 rows"),
        ({"token_weights": torch.ones(4, 1)}, ValueError, "token_weights must have 1 dim"),
        ({"token_weights": [1.0] * 4}, TypeError, "token_weights must be a tensor"),
        (
            {"token_weights": torch.ones(4, requires_grad=True)},
            ValueError,
            "token_weights must not require grad",
        ),
        ({"divergence": "forwrad_kl"}, ValueError, "Did you mean 'forward_kl'"),
        ({"divergence": 3}, TypeError, "must be a name or a Divergence, got int"),
        ({"backend": "tpu"}, ValueError, "backend must be one of .*, got 'tpu'"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "backend 'cuda' was requested but"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_divergence_rejects_in_words(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        _call(**changes)
    assert str(raised.value).startswith("divergence: ")


def test_divergence_needs_the_same_device():
    with pytest.raises(
        ValueError, match="teacher_logits must be on cpu like student_logits, got meta"
    ):
        _call(teacher_logits=torch.zeros(4, 20, device="meta"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_divergence_backends_agree(backend):
    student, teacher = gaussian(4, 20)
    loss = opk.divergence(student, teacher, divergence=D.jsd(0.2), backend=backend)
    assert loss.dtype == F32
    torch.testing.assert_close(loss, opk.divergence(student, teacher, divergence=D.jsd(beta=0.2)))
