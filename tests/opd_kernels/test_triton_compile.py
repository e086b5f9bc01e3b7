# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for a Hopper GPU on a machine without one, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import SPECS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.triton
FEW, ALL = "few", "all"
KERNELS = {
    "_divergence_fwd_kernel",
    "_divergence_bwd_kernel",
    "_divergence_fwd_grad_kernel",
    "_lse_kernel",
    "_row_sums_kernel",
    "_terms_kernel",
    "_finish_kernel",
    "_token_logprobs_fwd_kernel",
    "_token_logprobs_bwd_kernel",
    "_topk_divergence_fwd_kernel",
    "_topk_divergence_bwd_kernel",
    "_topk_logprobs_fwd_kernel",
    "_sample_tokens_fwd_kernel",
    "_row_tiles_kernel",
    "_close_rows_kernel",
    "_cut_rows_kernel",
    "_pair_tiles_kernel",
    "_draw_kernel",
    "_sparse_gradient_mark_kernel",
    "_sparse_gradient_pack_kernel",
    "_sparse_gradient_add_kernel",
}
KERNELS_OF_SEGMENTS = {
    "_scan_totals_kernel",
    "_scan_kernel",
    "_window_kernel",
    "_reduce_chunks_kernel",
    "_reduce_segments_kernel",
    "_broadcast_kernel",
    "_group_statistics_kernel",
}


@pytest.fixture(scope="module", params=[FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def printed(request, tmp_path_factory) -> dict:
    """What tests/triton_offline.py prints: of a few divergences, or of the family."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.triton_offline", request.param],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compiled(printed) -> list[dict]:
    return printed["compiled"]


def test_triton_kernels_compile_for_sm_90(compiled, request):
    names = {row["kernel"] for row in compiled}
    assert names == KERNELS
    if ALL in request.node.callspec.id:
        divergences = {row["divergence"] for row in compiled} - {None}
        assert divergences == {divergence.name for divergence in SPECS}


def test_triton_kernels_are_compiled_once_for_batches_of_any_size(printed):
    variants = printed["variants"]
    assert set(variants) == KERNELS | KERNELS_OF_SEGMENTS
    again = {name: count for name, count in variants.items() if count > 1}
    assert not again, again


def test_triton_kernels_spill_no_register(compiled):
    # not even with every option at once
    spilled = [row for row in compiled if row["spilled_bytes"]]
    assert not spilled, spilled


def test_triton_kernels_leave_room_for_two_programs_on_an_sm(compiled):
    # 65,536 registers per SM, 32 threads per warp
    crowded = [
        row
        for row in compiled
        if row["options"] == "plain" and row["registers"] * 32 * row["num_warps"] * 2 > 65536
    ]
    assert not crowded, crowded


def test_triton_kernels_load_16_bytes_at_a_time(compiled):
    # these read what others have found, and of the logits single ones
    closing = ("_finish_kernel", "_close_rows_kernel")
    reading = [row for row in compiled if row["kernel"] not in closing]
    narrow = [row for row in reading if not row["vector_loads"]]
    assert not narrow, narrow
