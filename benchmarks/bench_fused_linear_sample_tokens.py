# SPDX-License-Identifier: Apache-2.0
"""fused_linear_sample_tokens, a teacher's sampled law from hidden states, against its GEMM."""

from __future__ import annotations

import torch

import opd_kernels as opk
from benchmarks import bench_sample_tokens, harness
from benchmarks.bench_fused_linear_divergence import inputs
from benchmarks.shapes import CPU


def bench_fused_linear_sample_tokens(benchmark):
    """One GEMM of the head is the floor."""
    *_, hidden, weight = inputs(CPU)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(CPU.num_tokens, 50, generator=generator, dtype=torch.float64)
    out = torch.empty(CPU.num_tokens, CPU.vocab_size)
    benchmark.group = f"fused_linear_sample_tokens float32 {CPU}"
    ratios = harness.compare(
        benchmark,
        {
            "gemm": lambda: opk.gemm.gemm(out, hidden, weight.t()),
            harness.OURS: lambda: opk.fused_linear_sample_tokens(hidden, weight, uniforms),
            "eager": lambda: bench_sample_tokens.eager(hidden @ weight.t(), uniforms, 1.0),
        },
        floor="gemm",
        rounds=7,
        budget_s=8,
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
