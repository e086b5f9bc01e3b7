# SPDX-License-Identifier: Apache-2.0
"""The raw CUDA divergence ops under emulation against the CPU's: state, phases, in place."""

from __future__ import annotations

import pytest
import torch

from tests.cases import SPECS
from tests.checks import laws_of
from tests.native import needs_kernels
from tests.raw_divergence import (
    CALLS,
    call_of,
    check_in_place,
)
from tests.row_kernels.divergence_phases import *  # noqa: F403
from tests.row_kernels.gpu import CUDA

pytestmark = [needs_kernels("divergence"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA


CPU = torch.ops.opd


@pytest.mark.parametrize("name", [name for name in CALLS if name != "plain"])
@pytest.mark.parametrize("with_statistics", [True, False])
def test_cuda_fwd_grad_of_every_call_is_that_of_the_cpu(name, with_statistics):
    logits, laws = call_of(name)
    check_in_place(CUDA.ops, logits, laws, with_statistics, CPU)


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_cuda_fwd_grad_of_every_divergence_is_that_of_the_cpu(divergence, capability, monkeypatch):
    monkeypatch.setenv("OPD_EMULATION_CAPABILITY", capability)
    logits = [*torch.randn(2, 2, 2500), None]
    laws = laws_of(logits[0], 2500, divergence=divergence.public(), temperature=(0.7, 1.3))
    check_in_place(CUDA.ops, logits, laws, False, CPU)
