# SPDX-License-Identifier: Apache-2.0
"""The CUDA topk_logprobs kernel under emulation, by the public op, the fused op and the raw op."""

from __future__ import annotations

import pytest
import torch

from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.topk_logprobs import *  # noqa: F403
from tests.row_kernels.topk_logprobs import check_hostile_rows, on, same

pytestmark = [needs_kernels("topk_logprobs"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA


@pytest.mark.parametrize("num_topk", [64, 600])
def test_cuda_topk_logprobs_of_hostile_rows(gpu, num_topk):
    check_hostile_rows(gpu, 10_000, num_topk)


@pytest.mark.parametrize("seed", ["0", "3", "11"])
def test_cuda_topk_logprobs_do_not_depend_on_the_order_of_threads(gpu, seed, monkeypatch):
    logits, ids = torch.randn(2, 9001), torch.tensor([[5, 9000]] * 2)
    expected = on(gpu)(logits, 70, token_ids=ids)
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    assert same(on(gpu)(logits, 70, token_ids=ids), expected)
