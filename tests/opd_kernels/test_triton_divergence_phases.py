# SPDX-License-Identifier: Apache-2.0
"""The raw Triton divergence ops against the compiled ones: state, phases, slices, in place."""

from __future__ import annotations

import pytest
import torch

from tests.cases import SPECS
from tests.checks import laws_of
from tests.raw_divergence import (
    CALLS,
    call_of,
    check_in_place,
)
from tests.row_kernels.divergence_phases import *  # noqa: F403
from tests.row_kernels.divergence_phases import check_row_of_coefficients_zero
from tests.row_kernels.gpu import TRITON

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON


@pytest.mark.parametrize("name", [name for name in CALLS if name != "plain"])
@pytest.mark.parametrize("with_statistics", [True, False])
def test_triton_fwd_grad_is_forward_and_backward_in_place(name, with_statistics):
    logits, laws = call_of(name)
    check_in_place(TRITON.ops, logits, laws, with_statistics)


@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_triton_fwd_grad_of_every_divergence(divergence):
    # two blocks, the second of them partly filled
    logits = [*torch.randn(2, 2, 2500), None]
    laws = laws_of(logits[0], 2500, divergence=divergence.public(), temperature=(0.7, 1.3))
    check_in_place(TRITON.ops, logits, laws, False)


def test_cpu_row_of_coefficients_zero_has_no_gradient_whatever_it_holds():
    check_row_of_coefficients_zero(torch.ops.opd)
