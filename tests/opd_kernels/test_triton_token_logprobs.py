# SPDX-License-Identifier: Apache-2.0
"""The Triton token_logprobs kernels under the interpreter, by the public op and the raw ops."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import (
    F16,
    F32,
    token_ids_of,
)
from tests.checks import check_token_logprobs, dtype_id
from tests.row_kernels.gpu import TRITON
from tests.row_kernels.token_logprobs import *  # noqa: F403

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON


def triton_token_logprobs(*args, **keywords):
    return opk.token_logprobs(*args, backend="triton", **keywords)


@pytest.mark.parametrize("dtype", [F32, F16], ids=dtype_id)
def test_triton_token_logprobs_at_a_temperature(dtype):
    ids = token_ids_of(3, 2500, 1)
    check_token_logprobs(
        triton_token_logprobs,
        eager.token_logprobs,
        reference.token_logprobs,
        [(torch.randn(3, 2500) * 3).to(dtype)],
        ids,
        dtype,
        f"triton temperature {dtype_id(dtype)}",
        temperature=0.7,
    )


def test_triton_token_logprobs_of_an_id_out_of_range_is_nan():
    # a GPU kernel can't raise without a sync, and must not read beyond the row
    for softcap in (None, 5.0):
        out = triton_token_logprobs(
            torch.randn(3, 20), torch.tensor([-1, 20, 3]), softcap=softcap, logit_scale=-2.0
        )
        assert out.logprobs.isnan().tolist() == [True, True, False]
