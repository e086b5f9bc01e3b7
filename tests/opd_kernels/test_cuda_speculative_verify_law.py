# SPDX-License-Identifier: Apache-2.0
"""The law of what comes out of the CUDA speculative_verify kernels under emulation."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import _dispatch
from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.speculative_verify_law import *  # noqa: F403
from tests.verification import same
from tests.verification_laws import (
    EXACT_MODES,
    DistinctRows,
    chain_of,
    drafts_of_chain,
    verdict_of,
)

pytestmark = [needs_kernels("speculative_verify"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA


@pytest.fixture
def affordable(monkeypatch):
    """Thread by thread, the rows of 200,000 samples would take an hour: here each kind once."""
    _see_distinct_rows(monkeypatch)


def _see_distinct_rows(patch: pytest.MonkeyPatch) -> None:
    row_ops = _dispatch.row_ops

    def ops_of(backend: str):
        kernels = row_ops(backend)
        return DistinctRows(kernels) if backend == "cuda" else kernels

    patch.setattr(_dispatch, "row_ops", ops_of)


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_cuda_speculative_verify_says_of_a_row_the_same_in_any_company(mode, monkeypatch):
    chain, generator = chain_of("random"), torch.Generator().manual_seed(0)
    drafts = drafts_of_chain(chain, 100, 5, generator)
    expected = verdict_of(drafts, "cuda", mode)
    _see_distinct_rows(monkeypatch)
    same(verdict_of(drafts, "cuda", mode), expected)
