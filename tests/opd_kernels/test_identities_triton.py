# SPDX-License-Identifier: Apache-2.0
"""The first properties of test_identities.py on the Triton kernels, in their float32."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.cases import SPECS
from tests.checks import leaf

pytest.importorskip("triton")
pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("interpreted_triton")]
every_divergence = pytest.mark.parametrize("divergence", SPECS, ids=str)


def run(student, teacher, divergence):
    logits = leaf(student)
    loss = opk.divergence(logits, teacher, divergence=divergence.public(), backend="triton")
    loss.sum().backward()
    return loss.detach(), logits.grad


def laws(num_tokens: int = 3, vocab_size: int = 150):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(num_tokens, vocab_size, generator=generator) * 2
    return student, student + torch.randn(num_tokens, vocab_size, generator=generator)


@every_divergence
def test_triton_divergence_is_positive_and_its_gradient_sums_to_zero(divergence):
    loss, gradient = run(*laws(), divergence)
    assert bool((loss > 0).all())
    sums = gradient.double().sum(1).abs()
    assert bool((sums <= 1e-6 * gradient.abs().sum(1)).all())


@every_divergence
def test_triton_divergence_of_equal_laws_is_zero(divergence):
    student, _ = laws()
    loss, gradient = run(student, student.clone(), divergence)
    assert bool((loss == 0).all())
    assert gradient.abs().max() <= 1e-9


@every_divergence
def test_triton_divergence_does_not_see_a_shift_of_either_model(divergence):
    student, teacher = laws()
    # exact in float32: the logits are first cut to multiples of 2^-14
    student, teacher = ((x * 2**14).round() / 2**14 for x in (student, teacher))
    loss, gradient = run(student, teacher, divergence)
    moved, moved_gradient = run(student + 4.0, teacher - 8.0, divergence)
    torch.testing.assert_close(moved, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-4, atol=1e-5)
