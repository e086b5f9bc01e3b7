# SPDX-License-Identifier: Apache-2.0
"""fused_linear_token_logprobs, forward + backward, against its four GEMMs and eager torch."""

from __future__ import annotations

import torch

import opd_kernels as opk
from benchmarks import bench_token_logprobs, harness
from benchmarks.bench_fused_linear_divergence import inputs, with_backward
from benchmarks.shapes import CPU


def bench_fused_linear_token_logprobs(benchmark):
    """Logits twice (forward, recomputed in backward), dX and dW: four GEMMs of the student."""
    student_hidden, student_weight, *_ = inputs(CPU)
    token_ids = torch.arange(CPU.num_tokens) % CPU.vocab_size
    hidden, weight = student_hidden.detach(), student_weight.detach()
    logits = torch.empty(CPU.num_tokens, CPU.vocab_size)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def gemms() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)

    def ours(student, head):
        out = opk.fused_linear_token_logprobs(student, head, token_ids)
        return out.logprobs.sum() + 0.01 * out.entropy.sum()

    def eager(student, head):
        return bench_token_logprobs.eager(student @ head.t(), token_ids)

    benchmark.group = f"fused_linear_token_logprobs float32 {CPU}"
    tensors = (student_hidden, student_weight)
    ratios = harness.compare(
        benchmark,
        {
            "gemms": gemms,
            harness.OURS: with_backward(ours, tensors),
            "eager": with_backward(eager, tensors),
        },
        floor="gemms",
        rounds=7,
        budget_s=8,
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
