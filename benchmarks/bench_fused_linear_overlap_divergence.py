# SPDX-License-Identifier: Apache-2.0
"""fused_linear_overlap_divergence, forward + backward, against the fused divergence of one
vocabulary of the same sizes, its GEMMs and eager torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks import harness
from benchmarks.bench_fused_linear_divergence import gemms_of, inputs, with_backward
from benchmarks.shapes import CPU, CPU_LARGE_VOCAB

# share of the tokens that both have; time over that of one vocabulary
SHARED, GOAL = 0.7, 1.3


def pairs(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids of both sides, the student's ascending."""
    generator = torch.Generator().manual_seed(0)
    count = int(SHARED * vocab_size)
    ids = [torch.randperm(vocab_size, generator=generator)[:count] for _ in range(2)]
    return ids[0].sort().values, ids[1]


def eager(hidden: Tensor, head: Tensor, teacher: tuple[Tensor, Tensor], ids) -> Tensor:
    """Whole logits, the cells with a bucket, autograd."""
    laws = []
    for states, weight, own in ((hidden, head, ids[0]), (*teacher, ids[1])):
        logits = states @ weight.t()
        is_other = torch.ones(logits.shape[1], dtype=torch.bool)
        is_other[own] = False
        rest = logits[:, is_other].logsumexp(1, keepdim=True)
        laws.append(torch.cat([logits[:, own], rest], 1).log_softmax(1))
    return (laws[0].exp() * (laws[0] - laws[1].detach())).sum()


@pytest.mark.parametrize("shape", [CPU, CPU_LARGE_VOCAB], ids=str)
def bench_fused_linear_overlap_divergence(benchmark, shape):
    """reverse_kl with a bucket: the passes that pick the cells and spread their gradient."""
    tensors = inputs(shape)
    leaves, teacher, ids = tensors[:2], tensors[2:], pairs(shape.vocab_size)

    def ours(*student):
        return opk.fused_linear_overlap_divergence(*student, *teacher, *ids).loss

    def one_vocabulary(*student):
        return opk.fused_linear_divergence(*student, *teacher).loss

    def plain(*student):
        return eager(*student, teacher, ids)

    torch.testing.assert_close(ours(*leaves), plain(*leaves), rtol=1e-4, atol=0)
    benchmark.group = f"fused_linear_overlap_divergence float32 {shape} shared {SHARED}"
    turns = harness.take_turns(
        benchmark,
        {
            "gemms": gemms_of(tensors),
            "one vocabulary": with_backward(one_vocabulary, leaves),
            harness.OURS: with_backward(ours, leaves),
            "eager": with_backward(plain, leaves),
        },
        rounds=7,
        budget_s=30,
    )
    ratios = harness.record(benchmark, turns, "one vocabulary")
    harness.goal(
        benchmark,
        f"fused_linear_overlap_divergence over that of one vocabulary, {shape}",
        ratios[harness.OURS],
        at_most=GOAL,
        medians=benchmark.extra_info["ratio_to_floor_medians"][harness.OURS],
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
    harness.assert_goals(benchmark)
