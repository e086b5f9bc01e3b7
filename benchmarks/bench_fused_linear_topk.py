# SPDX-License-Identifier: Apache-2.0
"""fused_linear_topk, a teacher's compressed law from hidden states, against its GEMM and eager."""

from __future__ import annotations

import statistics

import torch

import opd_kernels as opk
from benchmarks import bench_topk_logprobs, harness
from benchmarks.bench_fused_linear_divergence import inputs
from benchmarks.shapes import Shape

# the teacher's side of a real vocabulary
SHAPE = Shape(512, 151_936, 64, 1024)
NUM_TOPK = 64
GOAL = 1.2


def bench_fused_linear_topk(benchmark):
    """One GEMM of the head is the floor: the library's, and the one that the op itself runs."""
    *_, hidden, weight = inputs(SHAPE)
    out = torch.empty(SHAPE.num_tokens, SHAPE.vocab_size)

    def ours():
        return opk.fused_linear_topk(hidden, weight, num_topk=NUM_TOPK)

    def eager():
        return bench_topk_logprobs.eager(hidden @ weight.t(), NUM_TOPK)

    benchmark.group = f"fused_linear_topk float32 {SHAPE} K{NUM_TOPK}"
    turns = harness.take_turns(
        benchmark,
        {
            "torch.mm": lambda: torch.mm(hidden, weight.t(), out=out),
            "gemm": lambda: opk.gemm.gemm(out, hidden, weight.t()),
            harness.OURS: ours,
            "eager": eager,
        },
        rounds=7,
        budget_s=25,
    )
    ratios = harness.record(benchmark, turns, "gemm")
    assert ratios[harness.OURS] < ratios["eager"], ratios
    for floor in ("gemm", "torch.mm"):
        harness.goal(
            benchmark,
            f"fused_linear_topk, K = {NUM_TOPK}, V = {SHAPE.vocab_size:,}: its time over {floor}",
            turns.ratio(harness.OURS, floor),
            at_most=GOAL,
            medians=turns.ratio(harness.OURS, floor, statistics.median),
        )
    harness.assert_goals(benchmark)
