# SPDX-License-Identifier: Apache-2.0
"""Properties of test_identities.py on the GPU kernels, in their float32, run on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opd_kernels as opk
from opd_kernels import divergences as D
from opd_kernels import targets
from tests.cases import F32, INF, SPECS
from tests.checks import leaf

seeds = st.integers(0, 2**31 - 1)
every_divergence = pytest.mark.parametrize("divergence", SPECS, ids=str)
# under hypothesis a fixture of a function runs once for all examples, which is what is wanted here
few = settings(max_examples=3)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Triton's interpreter; the CUDA kernels under tests/csrc/emulation."""
    if request.param == "triton":
        pytest.importorskip("triton")
    request.getfixturevalue(
        {"triton": "interpreted_triton", "cuda": "emulated_cuda"}[request.param]
    )
    return request.param


def run(backend, student, teacher, divergence, **options):
    logits = leaf(student)
    loss = opk.divergence(logits, teacher, divergence=divergence, backend=backend, **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


def laws(seed: int = 0, num_tokens: int = 3, vocab_size: int = 150):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, vocab_size, generator=generator) * 2
    return student, student + torch.randn(num_tokens, vocab_size, generator=generator)


def assert_near(one, other, rtol=1e-5):
    """Within float32's rounding of the largest entry."""
    for actual, expected in zip(one, other, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * size + 1e-9)


@every_divergence
def test_divergence_is_positive_and_its_gradient_sums_to_zero(backend, divergence):
    loss, gradient = run(backend, *laws(), divergence.public())
    assert bool((loss > 0).all())
    sums = gradient.double().sum(1).abs()
    assert bool((sums <= 1e-6 * gradient.abs().sum(1)).all())


@every_divergence
def test_divergence_of_equal_laws_is_zero(backend, divergence):
    student, _ = laws()
    loss, gradient = run(backend, student, student.clone(), divergence.public())
    assert bool((loss == 0).all())
    assert gradient.abs().max() <= 1e-9


@every_divergence
def test_divergence_does_not_see_a_shift_of_either_model(backend, divergence):
    student, teacher = laws()
    # exact in float32: the logits are first cut to multiples of 2^-14
    student, teacher = ((x * 2**14).round() / 2**14 for x in (student, teacher))
    plain = run(backend, student, teacher, divergence.public())
    assert_near(run(backend, student + 4.0, teacher - 8.0, divergence.public()), plain, 2e-5)


@every_divergence
def test_the_order_of_the_vocabulary_changes_nothing(backend, divergence):
    student, teacher = laws()
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(1))
    loss, gradient = run(backend, student, teacher, divergence.public())
    shuffled = run(backend, student[:, order], teacher[:, order], divergence.public())
    assert_near(shuffled, (loss, gradient[:, order]))


@every_divergence
def test_tokens_that_neither_model_has_change_nothing(backend, divergence):
    student, teacher = laws()
    loss, gradient = run(backend, student, teacher, divergence.public())
    absent = torch.full((3, 7), -INF)
    wide = run(
        backend,
        torch.cat([student, absent], 1),
        torch.cat([teacher, absent], 1),
        divergence.public(),
    )
    assert_near(wide, (loss, torch.cat([gradient, torch.zeros(3, 7)], 1)))


@every_divergence
def test_temperature_divides_the_logits(backend, divergence):
    student, teacher = laws()
    loss, gradient = run(backend, student, teacher, divergence.public(), temperature=2.0)
    divided, by_itself = run(backend, student / 2, teacher / 2, divergence.public())
    # halving is exact
    assert_near((loss, gradient), (divided, by_itself / 2))


@few
@given(seed=seeds)
def test_alpha_of_a_half_is_four_hellinger(backend_of_examples, seed):
    student, teacher = laws(seed)
    for backend in backend_of_examples:
        loss, gradient = run(backend, student, teacher, "squared_hellinger")
        for same in (D.alpha(0.5), D.alpha_beta(0.5, 0.5)):
            assert_near(run(backend, student, teacher, same), (4 * loss, 4 * gradient), 1e-4)


@few
@given(seed=seeds)
def test_todi_has_the_value_of_two_jeffreys_and_another_gradient(backend_of_examples, seed):
    student, teacher = laws(seed)
    for backend in backend_of_examples:
        value, gradient = run(backend, student, teacher, "todi")
        jeffreys, of_jeffreys = run(backend, student, teacher, D.jeffreys(0.5))
        assert_near([value], [2 * jeffreys])
        assert (gradient - 2 * of_jeffreys).abs().max() > 1e-3


@few
@given(seed=seeds)
def test_concrete_score_of_the_student_has_twice_the_gradient_of_reverse_kl(
    backend_of_examples, seed
):
    student, teacher = laws(seed)
    for backend in backend_of_examples:
        score = D.concrete_score(("student", "student"))
        _, gradient = run(backend, student, teacher, score)
        _, of_kl = run(backend, student, teacher, "reverse_kl")
        assert_near([gradient], [2 * of_kl], 1e-4)


@few
@given(seed=seeds, t=st.floats(0.0625, 0.9375))
def test_taid_has_the_gradient_of_renyi(backend_of_examples, seed, t):
    student, teacher = laws(seed)
    for backend in backend_of_examples:
        target = targets.geometric(1 - t, t)
        _, gradient = run(backend, student, teacher, "forward_kl", target=target)
        _, of_renyi = run(backend, student, teacher, D.renyi(t))
        assert_near([gradient], [of_renyi], 2e-4)


@few
@given(seed=seeds, beta=st.floats(0.0625, 0.9375))
def test_bounded_divergences_stay_below_their_bounds(backend_of_examples, seed, beta):
    student, teacher = laws(seed)
    bounds = {
        D.jsd(beta): -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta)),
        D.total_variation(): 1.0,
        D.squared_hellinger(): 1.0,
        D.skew_forward_kl(beta): -math.log(beta),
        D.skew_reverse_kl(beta): -math.log(beta),
    }
    for backend in backend_of_examples:
        for divergence, bound in bounds.items():
            # laws that share next to nothing come closest
            loss, _ = run(backend, student * 20, teacher.flip(1) * 20, divergence)
            assert bool((loss <= bound * (1 + 1e-6)).all()), divergence
            assert loss.dtype == F32


@pytest.fixture(scope="module")
def backend_of_examples(interpreted_triton, emulated_cuda_library):
    """Both backends: hypothesis wants fixtures that outlive an example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_CUDA_EMULATION", str(emulated_cuda_library))
        yield "triton", "cuda"
