# SPDX-License-Identifier: Apache-2.0
"""The CUDA segment kernels under emulation, in float32 and in float64."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.checks import dtype_id, leaf
from tests.native import needs_kernels
from tests.segments import (
    F32,
    F64,
    PACKS,
    SCANS,
    SHORT,
    check,
    check_group_statistics,
    eager_reduce,
    eager_scan,
    offsets_of,
    pack,
    slices,
)

pytestmark = [needs_kernels("segment_scan"), pytest.mark.usefixtures("emulated_cuda")]

CUDA = torch.ops.opd_cuda
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


@pytest.mark.parametrize("lengths", [SHORT["ragged"], SHORT["ones"], [], [0, 0], [300, 2]])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("correction", [0, 1])
def test_cuda_group_statistics_match_reference(correction, masked, lengths):
    values, offsets = pack(lengths)
    mask = torch.rand(values.shape) > 0.4 if masked else None
    check_group_statistics(values, offsets, "cuda", "cuda", mask=mask, correction=correction)


@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_cuda_scan_of_a_pack_is_that_of_its_segments_bit_by_bit(options):
    values, offsets = pack([13, 0, 5, 30])
    got = opk.segment_scan(values, offsets, backend="cuda", **options)
    for piece in slices(offsets):
        alone = offsets_of([piece.stop - piece.start])
        expected = opk.segment_scan(values[piece], alone, backend="cuda", **options)
        assert torch.equal(got[piece], expected)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_cuda_scan_spreads_a_bad_value_only_to_those_that_sum_it(options, bad):
    values, offsets = pack([6, 30, 5])
    values[20] = bad
    got = opk.segment_scan(values, offsets, backend="cuda", **options)
    truth = opk.segment_scan(values, offsets, backend="reference", **options)
    assert torch.equal(got.isfinite(), truth.isfinite())
    assert torch.equal(got.isnan(), truth.isnan())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cuda_reduce_keeps_nan_in_its_segment_and_does_not_read_weight_0(reduction):
    values, offsets = torch.randn(40), torch.tensor([0, 20, 40])
    values[13] = NAN
    got = opk.segment_reduce(values, offsets, reduction=reduction, backend="cuda")
    assert got.isnan().tolist() == [True, False]
    weights = torch.ones(40)
    weights[13] = 0
    options = {"reduction": reduction, "token_weights": weights}
    got = opk.segment_reduce(values, offsets, backend="cuda", **options)
    torch.testing.assert_close(got, opk.segment_reduce(values, offsets, **options))


def test_cuda_extremes_are_found_at_the_first_of_equal_values():
    values = torch.tensor([1.0, 3.0, 3.0, 0.0, 0.0, 5.0])
    offsets = torch.tensor([0, 3, 3, 6])
    for reduction, index in ((2, [1, -1, 5]), (3, [0, -1, 3])):
        _, found = CUDA.segment_scan_reduce(values, None, offsets, reduction)
        assert found.tolist() == index


def test_cuda_group_statistics_at_the_edges():
    values = torch.tensor([1.0, NAN, 3.0, 4.0, 6.0, 7.0, INF, 0.1, 0.1, 0.1])
    groups = torch.tensor([0, 3, 5, 6, 7, 7, 10])
    got = opk.group_statistics(values, groups, backend="cuda")
    expected = opk.group_statistics(values, groups, backend="cpu")
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)
    assert got.std[-1] == 0


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


def test_cuda_segments_opcheck():
    values, offsets = pack([3, 0, 12])
    weights = torch.rand(15)
    for options in ((0.9, 0, (1 << 63) - 1, 1, False), (0.9, 1, 2, 2, True)):
        torch.library.opcheck(CUDA.segment_scan_fwd, (leaf(values), offsets, *options))
    for reduction in range(4):
        arguments = (leaf(values), weights, offsets, reduction)
        torch.library.opcheck(CUDA.segment_scan_reduce, arguments)
    torch.library.opcheck(CUDA.segment_scan_broadcast, (leaf(torch.randn(3)), None, offsets, 15))
    mask = torch.ones(15, dtype=torch.uint8)
    torch.library.opcheck(CUDA.segment_scan_group_statistics, (values, mask, offsets, 1))


def test_cuda_segments_compile_without_a_graph_break():
    offsets = offsets_of([3, 0, 12])

    def loss(values):
        returns = opk.segment_scan(values * 1.5, offsets, discount=0.9, backend="cuda")
        means = opk.segment_reduce(returns, offsets, reduction="mean", backend="cuda")
        spread = opk.segment_broadcast(means, offsets, num_tokens=15, backend="cuda")
        baseline = opk.group_statistics(values.detach(), offsets, backend="cuda")
        return (spread * (returns - baseline.leave_one_out_mean)).sum()

    torch._dynamo.reset()
    values = torch.randn(15)
    expected, actual = leaf(values), leaf(values)
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    torch.testing.assert_close(actual.grad, expected.grad)
