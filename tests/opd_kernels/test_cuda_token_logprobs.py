# SPDX-License-Identifier: Apache-2.0
"""The CUDA token_logprobs kernels under emulation, by the public op and the raw ops."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.cases import (
    F64,
    token_ids_of,
)
from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.token_logprobs import *  # noqa: F403

pytestmark = [needs_kernels("token_logprobs"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA


def cuda_token_logprobs(*args, **keywords):
    return opk.token_logprobs(*args, backend="cuda", **keywords)


@pytest.mark.parametrize("seed", ["0", "3", "11"])
def test_cuda_token_logprobs_do_not_depend_on_the_order_of_threads(seed, monkeypatch):
    logits, ids = torch.randn(2, 2500), token_ids_of(2, 2500, 5)
    expected = cuda_token_logprobs(logits, ids)
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    for one, two in zip(cuda_token_logprobs(logits, ids), expected, strict=True):
        assert torch.equal(one, two)


def test_cuda_token_logprobs_refuses_float64_in_words():
    logits = torch.randn(2, 5, dtype=F64)
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the CUDA"):
        cuda_token_logprobs(logits, torch.zeros(2, dtype=torch.int64))
