# SPDX-License-Identifier: Apache-2.0
"""The CUDA sparse_gradient kernels under emulation: the results of the CPU's."""

from __future__ import annotations

import pytest
import torch

from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.sparse_gradient import *  # noqa: F403
from tests.row_kernels.sparse_gradient import gradient_of, through

pytestmark = [
    needs_kernels("sparse_gradient"),
    needs_kernels("divergence"),
    pytest.mark.usefixtures("emulated_cuda"),
]


@pytest.fixture
def gpu():
    return CUDA


@pytest.mark.parametrize("seed", ["3", "11"])
def test_cuda_sparse_gradient_does_not_depend_on_the_order_of_threads(seed, monkeypatch):
    gradient, weights = gradient_of(9, 700)
    expected = through(CUDA.ops, gradient, weights, 0)
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    for one, two in zip(through(CUDA.ops, gradient, weights, 0), expected, strict=True):
        assert torch.equal(one, two)
