# SPDX-License-Identifier: Apache-2.0
"""The CUDA token_logprobs kernels under emulation, by the public op and the raw ops."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests import twins
from tests.cases import token_ids_of
from tests.native import needs_kernels
from tests.twins.token_logprobs import (  # noqa: F401
    test_fused_linear_token_logprobs_of_a_bent_head_matches_reference,
    test_token_logprobs_at_a_temperature,
    test_token_logprobs_bwd_in_place_is_bwd,
    test_token_logprobs_compiles_without_a_graph_break,
    test_token_logprobs_matches_reference,
    test_token_logprobs_of_an_id_out_of_range_is_nan,
    test_token_logprobs_opcheck,
    test_token_logprobs_refuses_float64_in_words,
    test_token_logprobs_with_options_matches_reference,
    token_logprobs,
)

pytestmark = [needs_kernels("token_logprobs"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu(emulated_cuda):
    return twins.cuda()
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
    expected = opk.token_logprobs(logits, ids, backend="cuda")
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    actual = opk.token_logprobs(logits, ids, backend="cuda")
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one, two)


def test_cuda_token_logprobs_refuses_float64_in_words():
    logits = torch.randn(2, 5, dtype=F64)
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the CUDA"):
        cuda_token_logprobs(logits, torch.zeros(2, dtype=torch.int64))
