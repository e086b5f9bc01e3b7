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
from tests.row_kernels.gpu import TRITON
from tests.row_kernels.segment_scan import *  # noqa: F403
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


@pytest.fixture
def gpu(small_chunks):
    return TRITON


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
