# SPDX-License-Identifier: Apache-2.0
"""The CUDA segment kernels under emulation, in float32 and in float64."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.checks import dtype_id
from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.segment_scan import *  # noqa: F403
from tests.segments import (
    F32,
    F64,
    PACKS,
    SCANS,
    check,
    eager_reduce,
    eager_scan,
    offsets_of,
    pack,
)

pytestmark = [needs_kernels("segment_scan"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA


NAN, INF = float("nan"), float("inf")
REDUCTIONS = ("sum", "mean", "max", "min")
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)


@both_dtypes
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_cuda_segment_scan_matches_reference(options, lengths, dtype):
    if sum(lengths) > 500 and options not in ({}, SCANS["k_step"], SCANS["strided_window"]):
        lengths = [length // 8 for length in lengths]
    values, offsets = pack(lengths, dtype)
    check("segment_scan", eager_scan, values, offsets, "cuda", "cuda", **options)


@both_dtypes
@pytest.mark.parametrize("lengths", [*PACKS.values(), [50]], ids=[*PACKS, "fifty"])
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cuda_segment_reduce_matches_reference(reduction, weighted, lengths, dtype):
    values, offsets = pack(lengths, dtype)
    options = {"reduction": reduction}
    if weighted:
        options["token_weights"] = torch.rand(values.shape).where(torch.rand(values.shape) > 0.4, 0)
    check("segment_reduce", eager_reduce, values, offsets, "cuda", "cuda", **options)


@both_dtypes
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_cuda_segment_broadcast_matches_reference(lengths, dtype):
    values, offsets = torch.randn(len(lengths), dtype=dtype), offsets_of(lengths)

    def eager(values, offsets, num_tokens):
        return values.repeat_interleave(offsets.diff(), output_size=num_tokens)

    check("segment_broadcast", eager, values, offsets, "cuda", "cuda", num_tokens=sum(lengths))


def test_cuda_extremes_are_found_at_the_first_of_equal_values():
    values = torch.tensor([1.0, 3.0, 3.0, 0.0, 0.0, 5.0])
    offsets = torch.tensor([0, 3, 3, 6])
    for reduction, index in ((2, [1, -1, 5]), (3, [0, -1, 3])):
        _, found = CUDA.ops.segment_scan_reduce(values, None, offsets, reduction)
        assert found.tolist() == index


@pytest.mark.parametrize("seed", ["3", "11"])
def test_cuda_segments_do_not_depend_on_the_order_of_threads(seed, monkeypatch):
    values, offsets = pack([300, 0, 7, 40])

    def everything():
        yield opk.segment_scan(values, offsets, discount=0.9, backend="cuda")
        yield opk.segment_reduce(values, offsets, reduction="mean", backend="cuda")
        yield from opk.group_statistics(values, offsets, backend="cuda")

    expected = list(everything())
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    for one, two in zip(everything(), expected, strict=True):
        assert torch.equal(one, two)
