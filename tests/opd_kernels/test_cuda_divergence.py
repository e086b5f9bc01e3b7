# SPDX-License-Identifier: Apache-2.0
"""The CUDA divergence kernels under emulation, through the public ops."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.cases import (
    BF16,
    F32,
    F64,
    SPECS,
    Case,
)
from tests.checks import (
    check_divergence,
    dtype_id,
    leaf,
)
from tests.native import needs_kernels
from tests.row_kernels.divergence import *  # noqa: F403
from tests.row_kernels.gpu import CUDA

pytestmark = [needs_kernels("divergence"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_cuda_divergence_of_an_older_gpu_matches_reference(divergence, dtype, monkeypatch):
    # without clusters, and with less shared memory
    monkeypatch.setenv("OPD_EMULATION_CAPABILITY", "80")
    case = Case("older_gpu", 3, 1203, weights="some_zero")
    check_divergence(case, dtype, divergence, backend="cuda")


@pytest.mark.parametrize("seed", ["3", "11"])
def test_cuda_divergence_does_not_depend_on_the_order_of_threads(seed, monkeypatch):
    student, teacher = torch.randn(2, 2, 2500)

    def run():
        logits = leaf(student)
        loss = opk.divergence(logits, teacher, divergence="jsd", backend="cuda")
        loss.sum().backward()
        return loss.detach(), logits.grad

    expected = run()
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    for one, two in zip(run(), expected, strict=True):
        assert torch.equal(one, two)


def test_cuda_divergence_refuses_float64_in_words():
    logits = torch.randn(2, 5, dtype=F64)
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the CUDA"):
        opk.divergence(logits, logits, backend="cuda")
