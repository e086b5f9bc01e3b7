# SPDX-License-Identifier: Apache-2.0
"""speculative_verify on a GPU backend: the law of what comes out."""

from __future__ import annotations

import pytest

from tests.verification_laws import (
    EXACT_MODES,
    NUM_SAMPLES,
    PAIRS,
    check_calls,
    check_laws,
    even_work,
    of_each,
)


@pytest.fixture
def affordable():
    """What makes many samples affordable on a backend: nothing."""


@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("pair", ["random", "equal"])
def test_speculative_verify_has_the_law_of_the_teacher(gpu, pair, mode):
    check_laws(gpu.name, pair, mode, even_work(1000))


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_speculative_verify_of_few_sequences_is_that_of_many(gpu, mode):
    check_calls(gpu.name, "random", mode, {3: 36})


@pytest.mark.slow
@pytest.mark.laws
@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("pair", PAIRS)
def test_speculative_verify_of_200_000_samples_has_the_law_of_the_teacher(
    gpu, pair, mode, affordable, record_property
):
    check_laws(gpu.name, pair, mode, even_work(NUM_SAMPLES), record=record_property)


@pytest.mark.slow
@pytest.mark.laws
@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("pair", (*PAIRS, "equal"))
def test_speculative_verify_of_1_to_8_sequences_is_that_of_many(gpu, pair, mode):
    check_calls(gpu.name, pair, mode, of_each(36))
