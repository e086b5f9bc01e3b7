# SPDX-License-Identifier: Apache-2.0
"""The Triton speculative_verify kernels under the interpreter."""

from __future__ import annotations

import pytest

from tests.row_kernels.gpu import TRITON
from tests.row_kernels.speculative_verify import *  # noqa: F403
from tests.row_kernels.speculative_verify import NUM_SAMPLES, PAIRS, check_law

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_drafts"), [*zip(PAIRS, (1, 1, 2, 1), strict=True), ("near", 8)]
)
def test_triton_speculative_verify_of_200_000_samples_has_the_law_of_the_teacher(name, num_drafts):
    # many short rows share a program, which the emulation of CUDA has no match for
    check_law(TRITON, name, NUM_SAMPLES, num_drafts, 6)
