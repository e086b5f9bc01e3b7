# SPDX-License-Identifier: Apache-2.0
"""fused_linear_speculative_verify from hidden states, against its GEMMs and eager torch."""

from __future__ import annotations

import statistics

import torch

import opd_kernels as opk
from benchmarks import harness, laws
from benchmarks.bench_speculative_verify import NUM_DRAFTS, NUM_SEQUENCES, VOCAB_SIZE, eager
from benchmarks.shapes import Shape

PLACES = NUM_DRAFTS + 1
SHAPE = Shape(NUM_SEQUENCES * PLACES, VOCAB_SIZE, 256, 512)


def bench_fused_linear_speculative_verify(benchmark):
    """The issue's shape; both models' logits at every place are the floor."""
    peaked = laws.peaked(SHAPE)
    student, teacher = (
        hidden.view(NUM_SEQUENCES, PLACES, -1)
        for hidden in (peaked.student_hidden, peaked.teacher_hidden)
    )
    student = student[:, :-1].contiguous()
    heads = peaked.student_lm_head_weight, peaked.teacher_lm_head_weight
    generator = torch.Generator().manual_seed(0)
    law = (student @ heads[0].t()).softmax(-1).flatten(0, 1)
    drafts = law.multinomial(1, generator=generator).view(NUM_SEQUENCES, NUM_DRAFTS)
    uniforms = torch.rand(NUM_SEQUENCES, PLACES, generator=generator, dtype=torch.float64)
    out = [torch.empty(hidden.flatten(0, 1).shape[0], VOCAB_SIZE) for hidden in (student, teacher)]

    def ours(**options):
        return opk.fused_linear_speculative_verify(
            drafts, student, heads[0], teacher, heads[1], uniforms=uniforms, **options
        )

    benchmark.group = f"fused_linear_speculative_verify float32 {SHAPE}"
    turns = harness.take_turns(
        benchmark,
        {
            "gemm": lambda: [
                opk.gemm.gemm(target, hidden.flatten(0, 1), head.t())
                for target, hidden, head in zip(out, (student, teacher), heads, strict=True)
            ],
            harness.OURS: ours,
            "with 256 MiB": lambda: ours(workspace_bytes=256 << 20),
            "block": lambda: ours(mode="block"),
            "eager": lambda: eager(
                drafts, student @ heads[0].t(), teacher @ heads[1].t(), uniforms
            ),
        },
        rounds=7,
        budget_s=15,
    )
    harness.record(benchmark, turns, "gemm")
    harness.goal(
        benchmark,
        "verification, 8 sequences of 8 drafts, V = 151,936: eager torch's time over ours",
        turns.ratio("eager", harness.OURS),
        at_least=2.0,
        medians=turns.ratio("eager", harness.OURS, statistics.median),
        note="Ours within 64 MiB beside the heads, eager with both laws whole.",
    )
    harness.assert_goals(benchmark)
