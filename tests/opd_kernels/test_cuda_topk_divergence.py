# SPDX-License-Identifier: Apache-2.0
"""The CUDA topk_divergence kernels under emulation, by the public op and the raw ops."""

from __future__ import annotations

import pytest
import torch

from opd_kernels.token_logprobs import Law
from tests import topk_rows
from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.topk_divergence import *  # noqa: F403

pytestmark = [needs_kernels("topk_divergence"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA


@pytest.mark.parametrize("seed", ["0", "3", "11"])
def test_cuda_topk_divergence_does_not_depend_on_the_order_of_threads(seed, gpu, monkeypatch):
    logits, ids = torch.randn(2, 2500), topk_rows.ids_of(2, 2500, 300, 5)
    law = Law(None, None, [1.0, 4.0, 0.7], 2500)
    grads = torch.randn(2, 300), torch.randn(2)

    def run():
        rows = gpu.ops.topk_divergence_fwd(logits, ids, *law)
        return *rows, gpu.ops.topk_divergence_bwd(logits, ids, *grads, rows[2], *law)

    expected = run()
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    for one, two in zip(run(), expected, strict=True):
        assert torch.equal(one, two)
