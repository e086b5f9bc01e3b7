# SPDX-License-Identifier: Apache-2.0
"""segment_scan and its family against what torch offers: one long segment, many of one token."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness

NUM_TOKENS = 1 << 20
PACKS = {"one": 1, "sequences": 256, "ones": NUM_TOKENS}


def pack(num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """NUM_TOKENS values in segments of equal length."""
    torch.manual_seed(0)
    offsets = torch.arange(num_segments + 1) * (NUM_TOKENS // num_segments)
    return torch.randn(NUM_TOKENS), offsets


@pytest.mark.parametrize("num_segments", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("num_steps", [None, 8, 1000], ids=["whole", "k8", "k1000"])
def bench_scan(benchmark, num_steps, num_segments):
    """Undiscounted sums, which torch has as a cumsum of equally long rows."""
    values, offsets = pack(num_segments)
    rows, target = values.view(num_segments, -1), torch.empty_like(values)
    variants = {
        "copy": lambda: target.copy_(values),
        harness.OURS: lambda: opk.segment_scan(values, offsets, num_steps=num_steps),
    }
    if num_steps is None:
        variants["flipped cumsum"] = lambda: rows.flip(1).cumsum(1).flip(1)
        torch.testing.assert_close(
            variants[harness.OURS]().view_as(rows),
            rows.double().flip(1).cumsum(1).flip(1).float(),
            rtol=1e-5,
            atol=1e-3,
        )
    benchmark.group = f"segment_scan {num_segments} segments"
    harness.compare(benchmark, variants, floor="copy", rounds=5)


@pytest.mark.parametrize("num_segments", PACKS.values(), ids=PACKS)
def bench_reduce(benchmark, num_segments):
    """Means per segment against torch.segment_reduce."""
    values, offsets = pack(num_segments)
    target = torch.empty_like(values)
    variants = {
        "copy": lambda: target.copy_(values),
        harness.OURS: lambda: opk.segment_reduce(values, offsets, reduction="mean"),
        "torch.segment_reduce": lambda: torch.segment_reduce(values, "mean", offsets=offsets),
    }
    torch.testing.assert_close(
        variants[harness.OURS](), variants["torch.segment_reduce"](), rtol=1e-4, atol=1e-4
    )
    benchmark.group = f"segment_reduce {num_segments} segments"
    harness.compare(benchmark, variants, floor="copy", rounds=5)
