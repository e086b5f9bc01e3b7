# SPDX-License-Identifier: Apache-2.0
"""The raw divergence ops of a GPU backend against the CPU's: state, phases, slices."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import divergences as D
from opd_kernels.divergence import FINISH, LSE, OPEN, TERMS
from tests.cases import F16, F64, LIMIT_SPECS, SPECS
from tests.checks import laws_of, leaf
from tests.raw_divergence import (
    CALLS,
    LABELS,
    LIVE,
    NUM_TOKENS,
    SLICED,
    VOCAB,
    WEIGHTS,
    assert_same,
    backward_in_slices,
    call_of,
    in_slices,
)

CPU = torch.ops.opd
GRAD_LOSS = torch.tensor([2.0, 1.0, -0.7])
every_call = pytest.mark.parametrize("name", CALLS)


@every_call
def test_divergence_is_that_of_the_cpu(gpu, name):
    logits, laws = call_of(name)
    with_statistics = name != "plain"
    expected = CPU.divergence_fwd(*logits, *laws, with_statistics)
    actual = gpu.ops.divergence_fwd(*logits, *laws, with_statistics)
    assert_same(actual, expected)
    gradient = CPU.divergence_bwd(GRAD_LOSS, expected[1], *logits, *laws)
    assert bool((gradient[1] == 0).all()) and bool((gradient[:, VOCAB:] == 0).all())
    # from its own state and from the CPU's: a state may move between backends
    for state in (actual[1], expected[1]):
        assert_same([gpu.ops.divergence_bwd(GRAD_LOSS, state, *logits, *laws)], [gradient])
    assert_same([CPU.divergence_bwd(GRAD_LOSS, actual[1], *logits, *laws)], [gradient])


@every_call
def test_slices_are_the_whole_row(gpu, name):
    logits, laws = call_of(name)
    expected = gpu.ops.divergence_fwd(*logits, *laws, True)
    actual = in_slices(gpu.ops, logits, laws, True)
    assert_same(actual, expected)
    assert_same(actual, in_slices(CPU, logits, laws, True))
    gradient = gpu.ops.divergence_bwd(GRAD_LOSS, expected[1], *logits, *laws)
    sliced = backward_in_slices(gpu.ops, GRAD_LOSS, actual[1], logits, laws)
    assert_same([sliced], [gradient[:, :VOCAB]])


@pytest.mark.parametrize("divergence", SLICED, ids=str)
def test_slices_of_every_divergence(gpu, divergence):
    logits, laws = call_of("plain", divergence=divergence.public())
    expected = CPU.divergence_fwd(*logits, *laws, False)
    actual = in_slices(gpu.ops, logits, laws, False)
    assert_same(actual, expected)
    sliced = backward_in_slices(gpu.ops, GRAD_LOSS, actual[1], logits, laws)
    gradient = CPU.divergence_bwd(GRAD_LOSS, expected[1], *logits, *laws)
    assert_same([sliced], [gradient[:, :VOCAB]])


@pytest.mark.parametrize("target", LIVE)
@pytest.mark.parametrize("divergence", (*SPECS, *LIMIT_SPECS), ids=str)
def test_live_target_of_every_divergence(gpu, divergence, target):
    logits, laws = call_of("plain", divergence=divergence.public(), target=LIVE[target])
    expected = CPU.divergence_fwd(*logits, *laws, False)
    actual = gpu.ops.divergence_fwd(*logits, *laws, False)
    assert_same(actual, expected)
    gradients = [
        ops.divergence_bwd(GRAD_LOSS, state, *logits, *laws)
        for ops, state in ((gpu.ops, actual[1]), (CPU, expected[1]))
    ]
    assert_same(gradients[:1], gradients[1:])


def test_backward_skips_rows_without_upstream_gradient(gpu):
    logits, laws = call_of("sum", token_weights=None)
    logits = [None if side is None else side.nan_to_num(0.5) for side in logits]
    _, state, _ = gpu.ops.divergence_fwd(*logits, *laws, False)
    logits[0][2] = float("nan")
    gradient = gpu.ops.divergence_bwd(torch.tensor([1.0, 0.0, 0.0]), state, *logits, *laws)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[1:] == 0).all()) and not bool((gradient[0] == 0).all())


@pytest.mark.parametrize("order", [0.5, 3.0])
def test_renyi_of_laws_far_apart_is_that_of_the_cpu(gpu, order):
    # sum r underflows float32 at one order and overflows it at the other
    logits = [torch.zeros(1, 40), torch.zeros(1, 40), None]
    logits[0][0, 3], logits[1][0, 7] = 85.0, 85.0
    laws = laws_of(logits[0], 40, divergence=D.renyi(order))
    expected = CPU.divergence_fwd(*logits, *laws, False)
    actual = gpu.ops.divergence_fwd(*logits, *laws, False)
    assert bool(expected[0].isfinite().all())
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    gradients = [
        ops.divergence_bwd(torch.ones(1), state, *logits, *laws)
        for ops, state in ((gpu.ops, actual[1]), (CPU, expected[1]))
    ]
    assert_same(gradients[:1], gradients[1:])


def test_phases_refuse_adaptive_kl_in_the_words_of_the_cpu(gpu):
    logits, laws = call_of("plain", divergence="adaptive_kl")
    state = torch.empty(NUM_TOKENS, laws.state_size, dtype=F64)
    messages = []
    for ops in (CPU, gpu.ops):
        ops.divergence_phase_(state, *logits, *laws, OPEN, 0, False)
        with pytest.raises(RuntimeError, match="adaptive_kl sorts the teacher's law") as error:
            ops.divergence_phase_(state, *logits, *laws, LSE, 0, False)
        messages.append(str(error.value).splitlines()[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [F16, torch.bfloat16])
def test_divergence_of_16_bit_logits_is_that_of_the_cpu(gpu, dtype):
    logits, laws = call_of("everything")
    logits = [side.to(dtype) for side in logits]
    expected = CPU.divergence_fwd(*logits, *laws, True)
    actual = gpu.ops.divergence_fwd(*logits, *laws, True)
    assert_same(actual, expected)
    gradients = [
        ops.divergence_bwd(WEIGHTS, state, *logits, *laws)
        for ops, state in ((gpu.ops, actual[1]), (CPU, expected[1]))
    ]
    # one rounding to 16 bits apart
    eps = torch.finfo(dtype).eps
    assert_same(gradients[:1], gradients[1:], rtol=eps, atol=1e-3 * eps)


def test_divergence_opcheck(gpu):
    logits, laws = call_of("plain")
    logits = [None if side is None else side.nan_to_num(0.5) for side in logits]
    student, *others = logits
    torch.library.opcheck(gpu.ops.divergence_fwd, (leaf(student), *others, *laws, True))
    loss, state, _ = gpu.ops.divergence_fwd(*logits, *laws, False)
    ones = torch.ones_like(loss)
    torch.library.opcheck(gpu.ops.divergence_bwd, (ones, state, *logits, *laws))
    torch.library.opcheck(gpu.ops.divergence_bwd_, (ones, state, student, *others, *laws, 0, -1))
    torch.library.opcheck(gpu.ops.divergence_fwd_grad_, (*logits, *laws, True, -1))
    for phase in (TERMS, FINISH):
        torch.library.opcheck(gpu.ops.divergence_phase_, (state, *logits, *laws, phase, 0, True))


def check_row_of_coefficients_zero(ops):
    logits, laws = call_of(
        "plain",
        token_weights=None,
        divergence=[(WEIGHTS, "jsd"), (WEIGHTS, "cross_entropy")],
        **LABELS,
    )
    loss, state, _ = ops.divergence_fwd(*logits, *laws, False)
    gradient = ops.divergence_bwd(torch.ones(NUM_TOKENS), state, *logits, *laws)
    assert loss[1] == 0 and bool((gradient[1] == 0).all())
    student, teacher = logits[0].clone(), logits[1].clone()
    loss, _ = ops.divergence_fwd_grad_(student, teacher, None, *laws, False, -1)
    assert loss[1] == 0 and bool((student[1, :VOCAB] == 0).all())
    assert bool(student[0, :VOCAB].isfinite().all())


def test_row_of_coefficients_zero_has_no_gradient_whatever_it_holds(gpu):
    check_row_of_coefficients_zero(gpu.ops)
