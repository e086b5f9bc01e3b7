# SPDX-License-Identifier: Apache-2.0
"""topk_divergence from logits, forward + backward, against eager torch and two passes of memory."""

from __future__ import annotations

import functools

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness
from benchmarks.bench_divergence import NUM_TOKENS, VOCAB_SIZE, logits
from benchmarks.bench_fused_linear_divergence import with_backward

NUM_IDS = 64


@functools.cache
def teacher(num_ids: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, log-probs, log of the rest) of the teacher's top."""
    law = logits(torch.float32)[1].detach().double().log_softmax(-1)
    values, ids = law.topk(num_ids, -1)
    tail = law.scatter(1, ids, -torch.inf).logsumexp(-1)
    return ids, values.float(), tail.float()


def eager(
    values: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    tail: torch.Tensor,
    by_difference: bool = False,
) -> torch.Tensor:
    """Sum of KL(P || Q) on K + 1 cells: log_softmax, gather, and the rest of each row added up.

    by_difference: the rest as 1 minus what is at the ids, which is quick and loses small tails.
    """
    law = torch.log_softmax(values, -1)
    at_ids = law.gather(1, ids)
    if by_difference:
        rest = torch.log1p(-at_ids.exp().sum(-1))
    else:
        rest = law.scatter(1, ids, -torch.inf).logsumexp(-1)
    return (logprobs.exp() * (logprobs - at_ids)).sum() + (tail.exp() * (tail - rest)).sum()


def ours(values: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, tail: torch.Tensor):
    """The same by the kernels."""
    return opk.topk_divergence(values, ids, logprobs, tail_logprob=tail).sum()


@pytest.mark.parametrize("num_ids", [NUM_IDS, 1024])
def bench_topk_divergence(benchmark, num_ids):
    """forward_kl with a bucket, and its gradient; the floor is a copy of the logits."""
    student = logits(torch.float32)[0]
    target = torch.empty_like(student.detach())
    sparse = teacher(num_ids)
    tensors = (student,)
    benchmark.group = f"topk_divergence float32 T{NUM_TOKENS}-V{VOCAB_SIZE}-K{num_ids}"

    def dense(values: torch.Tensor) -> torch.Tensor:
        return opk.divergence(values, logits(torch.float32)[1], divergence="forward_kl").sum()

    expected = eager(student.detach().double(), *sparse)
    torch.testing.assert_close(ours(student, *sparse).double(), expected, rtol=1e-5, atol=0)
    ratios = harness.compare(
        benchmark,
        {
            "copy": lambda: target.copy_(student.detach()),
            harness.OURS: with_backward(lambda values: ours(values, *sparse), tensors),
            "eager": with_backward(lambda values: eager(values, *sparse), tensors),
            "eager, tail as 1 - sum": with_backward(
                lambda values: eager(values, *sparse, by_difference=True), tensors
            ),
            "whole laws": with_backward(dense, tensors),
        },
        floor="copy",
        rounds=7,
        budget_s=8,
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
