# SPDX-License-Identifier: Apache-2.0
"""The Triton topk_logprobs kernel under the interpreter, by the public, fused and raw op."""

from __future__ import annotations

import pytest
import torch

from tests.row_kernels.gpu import TRITON
from tests.row_kernels.topk_logprobs import *  # noqa: F403
from tests.row_kernels.topk_logprobs import check_hostile_rows, on, same
from tests.topk import check_topk_logprobs

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON


@pytest.mark.parametrize("num_topk", [64, 300])
def test_triton_topk_logprobs_of_hostile_rows(gpu, num_topk):
    check_hostile_rows(gpu, 5000, num_topk)


def test_triton_topk_logprobs_of_several_rows_in_one_program(gpu, monkeypatch):
    from opd_kernels.triton import topk_logprobs as kernels

    logits, ids = torch.randn(5, 700), torch.arange(5)
    expected = on(gpu)(logits, 70, token_ids=ids)
    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", 2)
    assert same(on(gpu)(logits, 70, token_ids=ids), expected)


def test_triton_topk_logprobs_of_many_wanted_tokens(gpu):
    logits = torch.randn(1, 6000) * 3
    check_topk_logprobs(on(gpu), logits, 1500, "triton K=1500")
