# SPDX-License-Identifier: Apache-2.0
"""The raw CUDA divergence ops under emulation against the CPU's: state, phases, in place."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import divergences as D
from opd_kernels.divergence import FINISH, LSE, OPEN, TERMS
from tests.cases import F16, F64, LIMIT_SPECS, SPECS
from tests.checks import laws_of, leaf
from tests.native import needs_kernels
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
    check_in_place,
    in_slices,
)

pytestmark = [needs_kernels("divergence"), pytest.mark.usefixtures("emulated_cuda")]

CPU, CUDA = torch.ops.opd, torch.ops.opd_cuda
GRAD_LOSS = torch.tensor([2.0, 1.0, -0.7])
every_call = pytest.mark.parametrize("name", CALLS)


@every_call
def test_cuda_divergence_is_that_of_the_cpu(name):
    logits, laws = call_of(name)
    with_statistics = name != "plain"
    expected = CPU.divergence_fwd(*logits, *laws, with_statistics)
    actual = CUDA.divergence_fwd(*logits, *laws, with_statistics)
    assert_same(actual, expected)
    gradient = CPU.divergence_bwd(GRAD_LOSS, expected[1], *logits, *laws)
    # from its own state and from the CPU's: a state may move between backends
    for state in (actual[1], expected[1]):
        assert_same([CUDA.divergence_bwd(GRAD_LOSS, state, *logits, *laws)], [gradient])
    assert_same([CPU.divergence_bwd(GRAD_LOSS, actual[1], *logits, *laws)], [gradient])


@every_call
def test_cuda_slices_are_the_whole_row(name):
    logits, laws = call_of(name)
    expected = CUDA.divergence_fwd(*logits, *laws, True)
    actual = in_slices(CUDA, logits, laws, True)
    assert_same(actual, expected)
    assert_same(actual, in_slices(CPU, logits, laws, True))
    gradient = CUDA.divergence_bwd(GRAD_LOSS, expected[1], *logits, *laws)
    sliced = backward_in_slices(CUDA, GRAD_LOSS, actual[1], logits, laws)
    assert_same([sliced], [gradient[:, :VOCAB]])


@pytest.mark.parametrize("divergence", SLICED, ids=str)
def test_cuda_slices_of_every_divergence(divergence):
    logits, laws = call_of("plain", divergence=divergence.public())
    expected = CPU.divergence_fwd(*logits, *laws, False)
    actual = in_slices(CUDA, logits, laws, False)
    assert_same(actual, expected)
    sliced = backward_in_slices(CUDA, GRAD_LOSS, actual[1], logits, laws)
    gradient = CPU.divergence_bwd(GRAD_LOSS, expected[1], *logits, *laws)
    assert_same([sliced], [gradient[:, :VOCAB]])


@pytest.mark.parametrize("target", LIVE)
@pytest.mark.parametrize("divergence", (*SPECS, *LIMIT_SPECS), ids=str)
def test_cuda_live_target_of_every_divergence(divergence, target):
    logits, laws = call_of("plain", divergence=divergence.public(), target=LIVE[target])
    expected = CPU.divergence_fwd(*logits, *laws, False)
    actual = CUDA.divergence_fwd(*logits, *laws, False)
    assert_same(actual, expected)
    gradients = [
        ops.divergence_bwd(GRAD_LOSS, state, *logits, *laws)
        for ops, state in ((CUDA, actual[1]), (CPU, expected[1]))
    ]
    assert_same(gradients[:1], gradients[1:])


@pytest.mark.parametrize("name", [name for name in CALLS if name != "plain"])
@pytest.mark.parametrize("with_statistics", [True, False])
def test_cuda_fwd_grad_of_every_call_is_that_of_the_cpu(name, with_statistics):
    logits, laws = call_of(name)
    check_in_place(CUDA, logits, laws, with_statistics, CPU)


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_cuda_fwd_grad_of_every_divergence_is_that_of_the_cpu(divergence, capability, monkeypatch):
    monkeypatch.setenv("OPD_EMULATION_CAPABILITY", capability)
    logits = [*torch.randn(2, 2, 2500), None]
    laws = laws_of(logits[0], 2500, divergence=divergence.public(), temperature=(0.7, 1.3))
    check_in_place(CUDA, logits, laws, False, CPU)


def test_cuda_backward_skips_rows_without_upstream_gradient():
    logits, laws = call_of("sum", token_weights=None)
    logits = [None if side is None else side.nan_to_num(0.5) for side in logits]
    _, state, _ = CUDA.divergence_fwd(*logits, *laws, False)
    logits[0][2] = float("nan")
    gradient = CUDA.divergence_bwd(torch.tensor([1.0, 0.0, 0.0]), state, *logits, *laws)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[1:] == 0).all()) and not bool((gradient[0] == 0).all())


@pytest.mark.parametrize("order", [0.5, 3.0])
def test_cuda_renyi_of_laws_far_apart_is_that_of_the_cpu(order):
    # sum r underflows float32 at one order and overflows it at the other
    logits = [torch.zeros(1, 40), torch.zeros(1, 40), None]
    logits[0][0, 3], logits[1][0, 7] = 85.0, 85.0
    laws = laws_of(logits[0], 40, divergence=D.renyi(order))
    expected = CPU.divergence_fwd(*logits, *laws, False)
    actual = CUDA.divergence_fwd(*logits, *laws, False)
    assert bool(expected[0].isfinite().all())
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)


def test_cuda_row_of_coefficients_zero_has_no_gradient_whatever_it_holds():
    logits, laws = call_of(
        "plain",
        token_weights=None,
        divergence=[(WEIGHTS, "jsd"), (WEIGHTS, "cross_entropy")],
        **LABELS,
    )
    loss, state, _ = CUDA.divergence_fwd(*logits, *laws, False)
    gradient = CUDA.divergence_bwd(torch.ones(NUM_TOKENS), state, *logits, *laws)
    assert loss[1] == 0 and bool((gradient[1] == 0).all())


def test_cuda_phases_refuse_adaptive_kl_in_the_words_of_the_cpu():
    logits, laws = call_of("plain", divergence="adaptive_kl")
    state = torch.empty(NUM_TOKENS, laws.state_size, dtype=F64)
    messages = []
    for ops in (CPU, CUDA):
        ops.divergence_phase_(state, *logits, *laws, OPEN, 0, False)
        with pytest.raises(RuntimeError, match="adaptive_kl sorts the teacher's law") as error:
            ops.divergence_phase_(state, *logits, *laws, LSE, 0, False)
        messages.append(str(error.value).splitlines()[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [F16, torch.bfloat16])
def test_cuda_divergence_of_16_bit_logits_is_that_of_the_cpu(dtype):
    logits, laws = call_of("everything")
    logits = [side.to(dtype) for side in logits]
    expected = CPU.divergence_fwd(*logits, *laws, True)
    actual = CUDA.divergence_fwd(*logits, *laws, True)
    assert_same(actual, expected)
    gradients = [
        ops.divergence_bwd(WEIGHTS, state, *logits, *laws)
        for ops, state in ((CUDA, actual[1]), (CPU, expected[1]))
    ]
    # one rounding to 16 bits apart
    eps = torch.finfo(dtype).eps
    assert_same(gradients[:1], gradients[1:], rtol=eps, atol=1e-3 * eps)


def test_cuda_divergence_opcheck():
    logits, laws = call_of("plain")
    logits = [None if side is None else side.nan_to_num(0.5) for side in logits]
    student, *others = logits
    torch.library.opcheck(CUDA.divergence_fwd, (leaf(student), *others, *laws, True))
    loss, state, _ = CUDA.divergence_fwd(*logits, *laws, False)
    ones = torch.ones_like(loss)
    torch.library.opcheck(CUDA.divergence_bwd, (ones, state, *logits, *laws))
    for phase in (TERMS, FINISH):
        torch.library.opcheck(CUDA.divergence_phase_, (state, *logits, *laws, phase, 0, True))
