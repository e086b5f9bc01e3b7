# SPDX-License-Identifier: Apache-2.0
"""fused_linear_topk_divergence, forward + backward, against its three GEMMs and eager torch."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks import bench_topk_divergence, harness
from benchmarks.bench_fused_linear_divergence import inputs, with_backward
from benchmarks.bench_topk_divergence import NUM_IDS
from benchmarks.shapes import CPU, CPU_LARGE_VOCAB, Shape
from opd_kernels.gemm import gemm

# time over that of the bare GEMMs
GOAL = 1.15


def teacher(shape: Shape, num_ids: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, log-probs, log of the rest) of the teacher's top, in parts that fit."""
    _, _, hidden, head = inputs(shape)
    found = []
    for rows in hidden.split(64):
        law = (rows @ head.t()).log_softmax(-1)
        values, ids = law.topk(num_ids, -1)
        found.append((ids, values, law.scatter(1, ids, -torch.inf).logsumexp(-1)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [CPU, CPU_LARGE_VOCAB], ids=str)
def bench_fused_linear_topk_divergence(benchmark, shape):
    """forward_kl with a bucket on 64 ids: logits, dX and dW, and two passes over the logits."""
    student_hidden, student_weight, *_ = inputs(shape)
    sparse = teacher(shape, NUM_IDS)
    hidden, weight = student_hidden.detach(), student_weight.detach()

    def gemms() -> tuple[torch.Tensor, ...]:
        logits = torch.mm(hidden, weight.t())
        return torch.mm(logits, weight), torch.mm(logits.t(), hidden)

    # the GEMMs that our loop runs, into buffers that no training step has
    logits = torch.empty(shape.num_tokens, shape.vocab_size)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def our_gemms() -> None:
        gemm(logits, hidden, weight.t())
        gemm(grad_hidden, logits, weight)
        gemm(grad_weight, logits.t(), hidden)

    def ours(student, head):
        ids, logprobs, tail = sparse
        return opk.fused_linear_topk_divergence(
            student, head, ids, logprobs, tail_logprob=tail
        ).loss

    def eager(student, head):
        return bench_topk_divergence.eager(student @ head.t(), *sparse)

    torch.testing.assert_close(ours(hidden, weight), eager(hidden, weight), rtol=1e-4, atol=0)
    benchmark.group = f"fused_linear_topk_divergence float32 {shape} K{NUM_IDS}"
    tensors = (student_hidden, student_weight)
    turns = harness.take_turns(
        benchmark,
        {
            "gemms": gemms,
            "our gemms into existing buffers": our_gemms,
            harness.OURS: with_backward(ours, tensors),
            "eager": with_backward(eager, tensors),
        },
        rounds=9,
        budget_s=20,
    )
    ratios = harness.record(benchmark, turns, "gemms")
    harness.goal(
        benchmark,
        f"fused_linear_topk_divergence over its three GEMMs, {shape}, K{NUM_IDS}",
        ratios[harness.OURS],
        at_most=GOAL,
        medians=benchmark.extra_info["ratio_to_floor_medians"][harness.OURS],
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
    harness.assert_goals(benchmark)
