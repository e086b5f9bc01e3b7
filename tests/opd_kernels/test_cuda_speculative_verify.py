# SPDX-License-Identifier: Apache-2.0
"""The CUDA speculative_verify kernels under emulation."""

from __future__ import annotations

import pytest
import torch

from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.speculative_verify import *  # noqa: F403
from tests.row_kernels.speculative_verify import logits_of, residual_of, rows_of

pytestmark = [
    needs_kernels("speculative_verify"),
    needs_kernels("divergence"),
    pytest.mark.usefixtures("emulated_cuda"),
]


@pytest.fixture
def gpu():
    return CUDA


@pytest.mark.parametrize("seed", ["3", "11"])
def test_cuda_speculative_verify_does_not_depend_on_the_order_of_threads(seed, monkeypatch):
    teacher, student = logits_of(2, 5000), logits_of(2, 5000, seed=1)
    ids, uniforms = torch.tensor([7, 4000]), torch.tensor([0.2, 0.9]).double()

    def run() -> list[torch.Tensor]:
        rows = rows_of(CUDA.ops, teacher, ids, 5000, (300, 0.9))
        return [*rows, *residual_of(CUDA.ops, teacher, student, uniforms, cut=(300, 0.9))]

    expected = run()
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    for one, two in zip(run(), expected, strict=True):
        assert torch.equal(one, two)


def test_cuda_speculative_verify_does_not_depend_on_where_a_row_begins():
    logits, ids = logits_of(4, 3001), torch.tensor([7, 2000, -1, 0])
    for cut in ((0, 1.0), (90, 0.9)):
        expected = rows_of(CUDA.ops, logits, ids, 3001, cut)
        for gap in (3, 7):
            wide = torch.full((4, 3001 + gap), float("nan"))
            wide[:, :3001] = logits
            for one, two in zip(rows_of(CUDA.ops, wide, ids, 3001, cut), expected, strict=True):
                assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))
