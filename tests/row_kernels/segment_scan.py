# SPDX-License-Identifier: Apache-2.0
"""The segment kernels of a GPU backend, through the public ops and the raw ops."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.checks import leaf
from tests.segments import (
    SCANS,
    SHORT,
    check_group_statistics,
    offsets_of,
    pack,
    slices,
)

NAN, INF = float("nan"), float("inf")
REDUCTIONS = ("sum", "mean", "max", "min")


@pytest.mark.parametrize("lengths", [SHORT["ragged"], SHORT["ones"], [], [0, 0], [300, 2]])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("correction", [0, 1])
def test_group_statistics_match_reference(gpu, correction, masked, lengths):
    values, offsets = pack(lengths)
    mask = torch.rand(values.shape) > 0.4 if masked else None
    check_group_statistics(values, offsets, gpu.name, gpu.name, mask=mask, correction=correction)


@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_scan_of_a_pack_is_that_of_its_segments_bit_by_bit(gpu, options):
    values, offsets = pack([13, 0, 5, 30])
    got = opk.segment_scan(values, offsets, backend=gpu.name, **options)
    for piece in slices(offsets):
        alone = offsets_of([piece.stop - piece.start])
        expected = opk.segment_scan(values[piece], alone, backend=gpu.name, **options)
        assert torch.equal(got[piece], expected)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_scan_spreads_a_bad_value_only_to_those_that_sum_it(gpu, options, bad):
    values, offsets = pack([6, 30, 5])
    values[20] = bad
    got = opk.segment_scan(values, offsets, backend=gpu.name, **options)
    truth = opk.segment_scan(values, offsets, backend="reference", **options)
    assert torch.equal(got.isfinite(), truth.isfinite())
    assert torch.equal(got.isnan(), truth.isnan())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_keeps_nan_in_its_segment_and_does_not_read_weight_0(gpu, reduction):
    values, offsets = torch.randn(40), torch.tensor([0, 20, 40])
    values[13] = NAN
    got = opk.segment_reduce(values, offsets, reduction=reduction, backend=gpu.name)
    assert got.isnan().tolist() == [True, False]
    weights = torch.ones(40)
    weights[13] = 0
    options = {"reduction": reduction, "token_weights": weights}
    got = opk.segment_reduce(values, offsets, backend=gpu.name, **options)
    torch.testing.assert_close(got, opk.segment_reduce(values, offsets, **options))


def test_group_statistics_at_the_edges(gpu):
    values = torch.tensor([1.0, NAN, 3.0, 4.0, 6.0, 7.0, INF, 0.1, 0.1, 0.1])
    groups = torch.tensor([0, 3, 5, 6, 7, 7, 10])
    got = opk.group_statistics(values, groups, backend=gpu.name)
    expected = opk.group_statistics(values, groups, backend="cpu")
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)
    assert got.std[-1] == 0


def test_segments_opcheck(gpu):
    values, offsets = pack([3, 0, 12])
    weights = torch.rand(15)
    for options in ((0.9, 0, (1 << 63) - 1, 1, False), (0.9, 1, 2, 2, True)):
        torch.library.opcheck(gpu.ops.segment_scan_fwd, (leaf(values), offsets, *options))
    for reduction in range(4):
        arguments = (leaf(values), weights, offsets, reduction)
        torch.library.opcheck(gpu.ops.segment_scan_reduce, arguments)
    torch.library.opcheck(gpu.ops.segment_scan_broadcast, (leaf(torch.randn(3)), None, offsets, 15))
    mask = torch.ones(15, dtype=torch.uint8)
    torch.library.opcheck(gpu.ops.segment_scan_group_statistics, (values, mask, offsets, 1))


def test_segments_compile_without_a_graph_break(gpu):
    offsets = offsets_of([3, 0, 12])

    def loss(values):
        returns = opk.segment_scan(values * 1.5, offsets, discount=0.9, backend=gpu.name)
        means = opk.segment_reduce(returns, offsets, reduction="mean", backend=gpu.name)
        spread = opk.segment_broadcast(means, offsets, num_tokens=15, backend=gpu.name)
        baseline = opk.group_statistics(values.detach(), offsets, backend=gpu.name)
        return (spread * (returns - baseline.leave_one_out_mean)).sum()

    torch._dynamo.reset()
    values = torch.randn(15)
    expected, actual = leaf(values), leaf(values)
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    torch.testing.assert_close(actual.grad, expected.grad)
