# SPDX-License-Identifier: Apache-2.0
"""The Triton segment kernels under the interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opd_kernels as opk
from tests.checks import dtype_id, leaf
from tests.segments import (
    F32,
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

NAN, INF = float("nan"), float("inf")
REDUCTIONS = ("sum", "mean", "max", "min")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # inf - inf and 0 * inf in lanes that are not taken, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so short that a test's segments have many, and more totals than are read at a time."""
    from opd_kernels.triton import segment_scan

    monkeypatch.setattr(segment_scan, "CHUNK", 8)
    monkeypatch.setattr(segment_scan, "_TOTALS", 2)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lengths", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_triton_segment_scan_matches_reference(options, lengths):
    values, offsets = pack(lengths)
    check("segment_scan", eager_scan, values, offsets, "triton", "triton", **options)


@pytest.mark.usefixtures("small_chunks")
def test_triton_segment_scan_over_many_chunks():
    values, offsets = pack([150, 1, 40])
    for options in ({}, {"discount": 0.97}, {"discount": 0.97, "direction": "prefix", "stride": 2}):
        check("segment_scan", eager_scan, values, offsets, "triton", "triton", **options)


def test_triton_segment_scan_at_its_own_chunk_size():
    values, offsets = pack([2500, 0, 3])
    check("segment_scan", eager_scan, values, offsets, "triton", "triton")
    check("segment_scan", eager_scan, values, offsets, "triton", "triton", num_steps=7)
    check("segment_reduce", eager_reduce, values, offsets, "triton", "triton", reduction="mean")
    check_group_statistics(values[2400:], offsets_of([100, 0, 3]), "triton", "triton")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lengths", [*SHORT.values(), [50]], ids=[*SHORT, "long"])
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_triton_segment_reduce_matches_reference(reduction, weighted, lengths):
    values, offsets = pack(lengths)
    options = {"reduction": reduction}
    if weighted:
        options["token_weights"] = torch.rand(values.shape).where(torch.rand(values.shape) > 0.4, 0)
    check("segment_reduce", eager_reduce, values, offsets, "triton", "triton", **options)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lengths", SHORT.values(), ids=SHORT)
def test_triton_segment_broadcast_matches_reference(lengths):
    values, offsets = torch.randn(len(lengths)), offsets_of(lengths)

    def eager(values, offsets, num_tokens):
        return values.repeat_interleave(offsets.diff(), output_size=num_tokens)

    check("segment_broadcast", eager, values, offsets, "triton", "triton", num_tokens=sum(lengths))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lengths", [SHORT["ragged"], SHORT["ones"], [], [0, 0], [30, 2]])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("correction", [0, 1])
def test_triton_group_statistics_match_reference(correction, masked, lengths):
    values, offsets = pack(lengths)
    mask = torch.rand(values.shape) > 0.4 if masked else None
    check_group_statistics(values, offsets, "triton", "triton", mask=mask, correction=correction)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_triton_scan_of_a_pack_is_that_of_its_segments_bit_by_bit(options):
    values, offsets = pack([13, 0, 5, 30])
    got = opk.segment_scan(values, offsets, backend="triton", **options)
    for piece in slices(offsets):
        alone = offsets_of([piece.stop - piece.start])
        expected = opk.segment_scan(values[piece], alone, backend="triton", **options)
        assert torch.equal(got[piece], expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_triton_scan_spreads_a_bad_value_only_to_those_that_sum_it(options, bad):
    values, offsets = pack([6, 30, 5])
    values[20] = bad
    got = opk.segment_scan(values, offsets, backend="triton", **options)
    truth = opk.segment_scan(values, offsets, backend="reference", **options)
    assert torch.equal(got.isfinite(), truth.isfinite())
    assert torch.equal(got.isnan(), truth.isnan())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_triton_reduce_keeps_nan_in_its_segment_and_does_not_read_weight_0(reduction):
    values, offsets = torch.randn(40), torch.tensor([0, 20, 40])
    values[13] = NAN
    got = opk.segment_reduce(values, offsets, reduction=reduction, backend="triton")
    assert got.isnan().tolist() == [True, False]
    weights = torch.ones(40)
    weights[13] = 0
    options = {"reduction": reduction, "token_weights": weights}
    got = opk.segment_reduce(values, offsets, backend="triton", **options)
    torch.testing.assert_close(got, opk.segment_reduce(values, offsets, **options))


def test_triton_group_statistics_at_the_edges():
    values = torch.tensor([1.0, NAN, 3.0, 4.0, 6.0, 7.0, INF, 0.1, 0.1, 0.1])
    groups = torch.tensor([0, 3, 5, 6, 7, 7, 10])
    got = opk.group_statistics(values, groups, backend="triton")
    expected = opk.group_statistics(values, groups, backend="cpu")
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)
    assert got.std[-1] == 0


@pytest.mark.parametrize("offsets", [[-5, 99, 3], [4, 2, 0], [0, 3, 2], [9, 9, 9], [19, 0, 20]])
@pytest.mark.usefixtures("small_chunks")
def test_triton_writes_nothing_outside_whatever_the_offsets(offsets, monkeypatch):
    # on a GPU wrong offsets are the caller's error, but not a way to write over other tensors
    from opd_kernels.triton import segment_scan

    launch, room, launches = segment_scan.launch, 256, []

    def launch_between_guards(kernel, num_programs, num_warps, *args, **constants):
        buffers = {}
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                buffers[i] = torch.full((arg.numel() + 2 * room,), 77, dtype=arg.dtype)
                buffers[i][room : room + arg.numel()] = arg
        inner = [buffers[i][room:-room] if i in buffers else arg for i, arg in enumerate(args)]
        launch(kernel, num_programs, num_warps, *inner, **constants)
        for i, buffer in buffers.items():
            assert bool((buffer[:room] == 77).all() and (buffer[-room:] == 77).all())
            args[i].copy_(inner[i])
        launches.append(kernel)

    monkeypatch.setattr(segment_scan, "launch", launch_between_guards)
    offsets, values = torch.tensor(offsets), torch.randn(20)
    for options in ({}, {"num_steps": 3}, {"discount": 0.5, "direction": "prefix", "stride": 2}):
        opk.segment_scan(values, offsets, backend="triton", **options)
    for reduction in ("sum", "max"):
        opk.segment_reduce(values, offsets, reduction=reduction, backend="triton")
    opk.segment_broadcast(values[:2], offsets, num_tokens=20, backend="triton")
    opk.group_statistics(values, offsets, backend="triton")
    assert len(launches) == 11


@pytest.mark.usefixtures("small_chunks")
def test_triton_takes_16_bit_values_and_int32_offsets():
    values, offsets = pack([4, 9], torch.bfloat16)
    x, y = leaf(values), leaf(values)
    opk.segment_scan(x, offsets.int(), discount=0.9, backend="triton").sum().backward()
    opk.segment_scan(y, offsets, discount=0.9, backend="cpu").sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad, y.grad)


@pytest.mark.usefixtures("small_chunks")
def test_triton_opcheck():
    values, offsets = pack([3, 0, 12])
    weights, ops = torch.rand(15), torch.ops.opd_triton
    for options in ((0.9, 0, (1 << 63) - 1, 1, False), (0.9, 1, 2, 2, True)):
        torch.library.opcheck(ops.segment_scan_fwd, (leaf(values), offsets, *options))
    for reduction in range(4):
        torch.library.opcheck(ops.segment_scan_reduce, (leaf(values), weights, offsets, reduction))
    torch.library.opcheck(ops.segment_scan_broadcast, (leaf(torch.randn(3)), None, offsets, 15))
    mask = torch.ones(15, dtype=torch.uint8)
    torch.library.opcheck(ops.segment_scan_group_statistics, (values, mask, offsets, 1))


@pytest.mark.usefixtures("small_chunks")
def test_triton_compiles_without_a_graph_break():
    offsets = offsets_of([3, 0, 12])

    def loss(values):
        returns = opk.segment_scan(values * 1.5, offsets, discount=0.9, backend="triton")
        means = opk.segment_reduce(returns, offsets, reduction="mean", backend="triton")
        spread = opk.segment_broadcast(means, offsets, num_tokens=15, backend="triton")
        baseline = opk.group_statistics(values.detach(), offsets, backend="triton")
        return (spread * (returns - baseline.leave_one_out_mean)).sum()

    torch._dynamo.reset()
    values = torch.randn(15)
    expected, actual = leaf(values), leaf(values)
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.usefixtures("small_chunks")
def test_triton_gradients_of_second_order():
    values, offsets = pack([3, 0, 12])
    x, y = leaf(values), leaf(values)
    for z, backend in ((x, "triton"), (y, "cpu")):
        out = opk.segment_scan(z**3, offsets, discount=0.9, backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), z, create_graph=True)
        grad.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_triton_segment_kernels_compile_for_sm_90(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.triton_offline_segment_scan"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads(result.stdout)
    assert len({row["kernel"] for row in rows}) == 7
    spilled = [row for row in rows if row["spilled_bytes"]]
    assert not spilled, spilled
    # two programs on an SM: 65,536 registers, 32 threads per warp
    crowded = [row for row in rows if row["registers"] * 32 * row["num_warps"] * 2 > 65536]
    assert not crowded, crowded


@pytest.mark.parametrize("dtype", [torch.float64], ids=dtype_id)
def test_triton_refuses_float64_in_words(dtype):
    values, offsets = pack([3], dtype)
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the Triton"):
        opk.segment_scan(values, offsets, backend="triton")
    assert opk.segment_scan(values.to(F32), offsets, backend="triton").dtype == F32
